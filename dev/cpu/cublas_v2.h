// cuBLAS' products, by gemm.h.
#pragma once

#include "gemm.h"

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
enum cublasMath_t {
    CUBLAS_DEFAULT_MATH = 0,
    CUBLAS_PEDANTIC_MATH = 2,
    CUBLAS_TF32_TENSOR_OP_MATH = 3,
    CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
};
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
using cudaDataType_t = cudaDataType;
using cublasHandle_t = struct cublasContext *;

inline cublasStatus_t cublasCreate(cublasHandle_t *handle) {
    *handle = nullptr;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
namespace cuda_on_cpu {
inline void *cublas_workspace = nullptr;
} // namespace cuda_on_cpu
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *workspace, size_t) {
    cuda_on_cpu::cublas_workspace = workspace;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
inline const char *cublasGetStatusString(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return "success";
    return status == CUBLAS_STATUS_INVALID_VALUE ? "invalid value" : "not supported";
}

inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t opA, cublasOperation_t opB, int M,
                                                 int N, int K, const void *alpha, const void *A, cudaDataType typeA,
                                                 int lda, long long strideA, const void *B, cudaDataType typeB, int ldb,
                                                 long long strideB, const void *beta, void *C, cudaDataType typeC,
                                                 int ldc, long long strideC, int batches, cublasComputeType_t,
                                                 cublasGemmAlgo_t) {
    using namespace cuda_on_cpu;
    const bool transA = opA == CUBLAS_OP_T, transB = opB == CUBLAS_OP_T;
    if (M < 0 || N < 0 || K < 0 || batches < 0 || lda < (transA ? K : M) || ldb < (transB ? N : K) || ldc < M)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (typeA != typeB) return CUBLAS_STATUS_NOT_SUPPORTED;
    const Matrix a = {const_cast<void *>(A), typeA == CUDA_R_16BF, lda, strideA};
    const Matrix b = {const_cast<void *>(B), typeB == CUDA_R_16BF, ldb, strideB};
    const Matrix c = {C, typeC == CUDA_R_16BF, ldc, strideC};
    gemm(transA, transB, M, N, K, *static_cast<const float *>(alpha), a, b, *static_cast<const float *>(beta), c,
         batches);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t opA, cublasOperation_t opB, int M, int N,
                                   int K, const void *alpha, const void *A, cudaDataType typeA, int lda, const void *B,
                                   cudaDataType typeB, int ldb, const void *beta, void *C, cudaDataType typeC, int ldc,
                                   cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, opA, opB, M, N, K, alpha, A, typeA, lda, 0, B, typeB, ldb, 0, beta, C,
                                      typeC, ldc, 0, 1, compute, algorithm);
}
