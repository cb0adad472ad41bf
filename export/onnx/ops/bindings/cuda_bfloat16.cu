#include "cuda_units.cuh"

template class ir::CudaDecide<ir::abi::kBFloat16>;
template class ir::CudaMlp<ir::abi::kBFloat16>;
template class ir::CudaAttention<ir::abi::kBFloat16>;
