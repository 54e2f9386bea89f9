#include "cuda/launch.cuh"

template cudaError_t gradcampp::launch_plan<__half>(const Plan&, Method, bool, cudaStream_t);
