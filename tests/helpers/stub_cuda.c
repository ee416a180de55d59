/* libcuda.so.1 for helpers/host_path.py: the driver calls that Triton makes, on an H200 that is not
 * there. Nothing runs. A launch that the real driver would refuse returns an error with its reason. */

#include <cuda.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define SHARED_PER_BLOCK (227 << 10)
#define SHARED_WITHOUT_REQUEST (48 << 10)
#define MAX_FUNCTIONS 4096

struct function {
    int shared_limit;
};

static struct function functions[MAX_FUNCTIONS];
static int loaded;
static long launched;
static char problem[256] = "no error";

static CUresult refuse(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(problem, sizeof problem, format, values);
    va_end(values);
    return CUDA_ERROR_INVALID_VALUE;
}

long stub_loaded(void) { return loaded; }
long stub_launched(void) { return launched; }

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_SUCCESS ? "no error" : problem;
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return cuCtxGetCurrent(context);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_PER_BLOCK; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
    default: return refuse("the stub has no device attribute %d", (int)attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        return refuse("the stub has no pointer attribute %d", (int)attribute);
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (memcmp(image, "\177ELF", 4) != 0) return refuse("a module is no machine code");
    if (loaded == MAX_FUNCTIONS) return refuse("the stub has room for %d modules", MAX_FUNCTIONS);
    functions[loaded].shared_limit = SHARED_WITHOUT_REQUEST;
    *module = (CUmodule)&functions[loaded++];
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)module;
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value > SHARED_PER_BLOCK) return refuse("%d bytes of shared memory requested", value);
        ((struct function *)function)->shared_limit = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **params, void **extra) {
    struct function *f = (struct function *)function;
    if (f < functions || f >= functions + loaded) return refuse("an unknown function is launched");
    if (!c->gridDimX || c->gridDimX > 0x7fffffff || !c->gridDimY || c->gridDimY > 65535 ||
        !c->gridDimZ || c->gridDimZ > 65535)
        return refuse("grid %u x %u x %u", c->gridDimX, c->gridDimY, c->gridDimZ);
    if (!c->blockDimX || c->blockDimX * c->blockDimY * c->blockDimZ > 1024)
        return refuse("block %u x %u x %u", c->blockDimX, c->blockDimY, c->blockDimZ);
    if (c->sharedMemBytes > (unsigned)f->shared_limit)
        return refuse("%u bytes of shared memory, %d allowed", c->sharedMemBytes, f->shared_limit);
    launched++;
    return CUDA_SUCCESS;
}

static int size_of(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
    }
}

/* The rules of the CUDA driver API; the types with fewer than 8 bits are not among them. */
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    int unit = interleave == CU_TENSOR_MAP_INTERLEAVE_32B ? 32 : 16;
    unsigned long widest = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                           : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                           : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                                   : 256 * 8;
    if ((size_t)map % 64) return refuse("a tensor map at an address that is no multiple of 64");
    if (rank < 1 || rank > 5) return refuse("a tensor map of rank %u", rank);
    if (!address || (size_t)address % unit) return refuse("a tensor at %p, not at %d bytes", address, unit);
    for (cuuint32_t i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32) return refuse("size %u is %llu", i, (unsigned long long)sizes[i]);
        if (i && (strides[i - 1] % unit || strides[i - 1] >= 1ull << 40))
            return refuse("stride %u is %llu bytes", i - 1, (unsigned long long)strides[i - 1]);
        if (!box[i] || box[i] > 256) return refuse("box %u is %u", i, box[i]);
        if (!steps[i] || steps[i] > 8) return refuse("element stride %u is %u", i, steps[i]);
    }
    unsigned long inner = (unsigned long)box[0] * size_of(type);
    if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && (inner % 16 || inner > widest))
        return refuse("the inner box has %lu bytes", inner);
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *c) {
    return refuse("a cluster launch: the stub has no rules for it");
}
