#include "cuda_units.cuh"

template class ir::CudaDecide<ir::abi::kFloat16>;
template class ir::CudaMlp<ir::abi::kFloat16>;
template class ir::CudaAttention<ir::abi::kFloat16>;
