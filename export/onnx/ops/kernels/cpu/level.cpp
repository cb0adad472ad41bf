// The CPU kernels for one instruction set.
