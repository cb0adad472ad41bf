#include "cuda_units.cuh"

template class ir::CudaDecide<ir::abi::kFloat>;
template class ir::CudaMlp<ir::abi::kFloat>;
template class ir::CudaAttention<ir::abi::kFloat>;
