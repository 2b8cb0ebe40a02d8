"""What tests share: modules and networks, Trainers and their data, strategies and ranks, tensors and engines."""
