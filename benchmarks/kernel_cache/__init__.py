"""A cache of compiled Triton kernels that is filled without a GPU and travels to one.

Where GPU time is short, compiling must not take it. These commands compile the kernels of launches as `benchmarks.gpu`
makes them, for Hopper GPUs, and give Triton on another machine a cache in which it finds them:

    python -m benchmarks.kernel_cache fill FOLDER           # here, with the version of Triton that is used there
    python -m benchmarks.kernel_cache pack FOLDER FILE      # what a later process needs, as FILE.tar.xz
    python -m benchmarks.kernel_cache unpack FILE FOLDER    # there
    TRITON_CACHE_DIR=FOLDER python -m benchmarks.gpu ...    # there
    python -m benchmarks.kernel_cache report FOLDER         # there: which kernels the cache lacked

Four things decide whether Triton finds an entry, and each is dealt with:

* The launch: types of arguments, whether addresses and numbers are divisible by 16, options. `launches.py` makes real
  launches of real steps on CPU tensors; `driver.py` stands in for the GPU and runs nothing.
* The source of a kernel and of the functions that it calls. Fill the cache again when a kernel has changed: what is
  there already is not compiled again, and what no launch asked for is not packed.
* The build of Triton: its files, and the versions of its assembler and device library. They are part of the name of an
  entry, so `unpack` computes all names anew where it runs. Another build of the same version finds the entries too.
* The folder: Triton notes absolute paths, which `unpack` writes as well.

The small C modules through which Triton launches kernels travel too, linked to an empty libcuda.so.1. Where one cannot
be loaded, Triton builds it again by itself.
"""
