#include "cuda/launch.cuh"

template cudaError_t gradcampp::launch_plan<__nv_bfloat16>(const Plan&, Method, bool, cudaStream_t);
