#include "cuda/launch.cuh"

template cudaError_t gradcampp::launch_plan<float>(const Plan&, Method, bool, cudaStream_t);
