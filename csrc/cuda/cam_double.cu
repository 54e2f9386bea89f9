#include "cuda/launch.cuh"

template cudaError_t gradcampp::launch_plan<double>(const Plan&, Method, bool, cudaStream_t);
