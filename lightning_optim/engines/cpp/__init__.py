"""C++ source: compiled by the compiler of the machine, stored in the cache folder of the user, and loaded."""
