"""Integer arithmetic of the runtimes, in numpy alone: kernels, and the simulator that runs a program with them."""
