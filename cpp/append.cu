// The kernel of append.h: a warp finds where its rows go, then the CTA goes through their numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <type_traits>

#include "append.h"
#include "common/launch.h"
#include "decode/divider.h"

namespace jax_fa3 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kMostRows = 32;  // of a CTA
constexpr int kCtasPerSm = 4;  // that there are before CTAs take more than one row
constexpr int kVectorBytes = 16;

struct Params {
  AppendProblem problem;
  int rows_of_cta;
  decode::Divider rows_each;
  decode::Divider page_size;
  // A row's vectors are those of its keys, its values and its queries.
  decode::Divider vectors;
  int key_vectors;
  int value_vectors;
  decode::Divider head;  // of key and query
  decode::Divider head_v;
};

// What becomes of a row.
struct Place {
  int sequence;
  int page;
  int slot;
  int angle;  // the tables' row
  bool is_written;
  bool is_mistaken;
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Vector {
  T x[kCount];

  __device__ static Vector load(void const* array, int64_t index) {
    return *reinterpret_cast<Vector const*>(static_cast<T const*>(array) + index);
  }
  __device__ void store(void* array, int64_t index) const {
    *reinterpret_cast<Vector*>(static_cast<T*>(array) + index) = *this;
  }
};

__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void round_to(__half& x, float y) { x = __float2half_rn(y); }
__device__ void round_to(__nv_bfloat16& x, float y) { x = __float2bfloat16_rn(y); }

// The sequence of a row, as jax_fa3/kv_cache/_sequences.py has it, and whether anything is wrong
// with it: by a whole warp. A warp's rows come in order.
class Finder {
 public:
  __device__ explicit Finder(Params const& params)
      : params_(params),
        lane_(threadIdx.x % 32),
        ours_(params.problem.sequences.num_ours()),
        index_(0),
        sequence_{} {}

  __device__ Place find(int row) {
    if (ours_ > 0 && !is_of(row)) enter(row);
    AppendProblem const& p = params_.problem;
    int const position = sequence_.length - sequence_.count + row - sequence_.first_row;
    bool const real = ours_ > 0 && is_of(row);
    int const angle = p.positions == nullptr ? position : p.positions[row];
    Place place{index_, 0, 0, max(0, min(angle, p.tables.positions - 1)), false, false};
    place.is_mistaken = real && is_mistaken_;
    place.is_written = real && !is_mistaken_ && position >= 0;
    if (!place.is_written) return place;
    int const entry = params_.page_size(position);
    place.page = page(entry);
    place.slot = position - entry * p.page_size;
    return place;
  }

 private:
  __device__ bool is_of(int row) const {
    return row >= sequence_.first_row && row - sequence_.first_row < sequence_.count;
  }

  __device__ int page(int entry) const {
    AppendProblem const& p = params_.problem;
    if (p.page_table == nullptr) return index_;
    return p.page_table[int64_t{index_} * p.pages_per_sequence + entry];
  }

  __device__ void enter(int row) {
    decode::Sequences const& all = params_.problem.sequences;
    bool back = false;
    if (all.query_starts == nullptr) {
      index_ = min(params_.rows_each(row), ours_ - 1);
    } else {
      int before = 0;
      for (int i = lane_; i < ours_; i += 32) {
        before += all.query_starts[i] <= row;
        back |= all.goes_back(i);
      }
      back = __any_sync(~0u, back);
      index_ = back ? 0 : max(__reduce_add_sync(~0u, before) - 1, 0);
    }
    sequence_ = all.at(index_, back);
    is_mistaken_ = sequence_.mistaken || __any_sync(~0u, is_of(row) && finds_mistake());
  }

  // Whether this lane does.
  __device__ bool finds_mistake() const {
    AppendProblem const& p = params_.problem;
    decode::Sequence const& x = sequence_;
    bool found = p.tables.cos != nullptr && p.positions == nullptr && x.length > p.tables.positions;
    if (p.tables.cos != nullptr && p.positions != nullptr) {
      for (int i = lane_; i < x.count; i += 32) {
        found |= p.positions[x.first_row + i] >= p.tables.positions;
      }
    }
    if (x.length == 0) return found;
    int const last = params_.page_size(x.length - 1);
    for (int i = params_.page_size(max(x.length - x.count, 0)) + lane_; i <= last; i += 32) {
      found |= static_cast<unsigned>(page(i)) >= static_cast<unsigned>(p.num_pages);
    }
    return found;
  }

  Params const& params_;
  int lane_;
  int ours_;
  int index_;
  decode::Sequence sequence_;
  bool is_mistaken_ = false;
};

template <class Element, int kCount>
__device__ void load_angles(RotaryTables const& tables, void const* table, int64_t index,
                            float (&angles)[kCount]) {
  if (tables.is_fp32) {
    auto const x = Vector<float, kCount>::load(table, index);
    for (int i = 0; i < kCount; ++i) angles[i] = x.x[i];
  } else {
    auto const x = Vector<Element, kCount>::load(table, index);
    for (int i = 0; i < kCount; ++i) angles[i] = to_float(x.x[i]);
  }
}

// Numbers from `column` on of a head's row, turned: a cos - b sin and b cos + a sin in fp32,
// without fused multiply-adds, as XLA has it on GPUs, and rounded once.
template <class Element, int kVector>
__device__ Vector<Element, kVector> turned(RotaryTables const& tables, void const* rows,
                                           int64_t first, int column, int angle) {
  auto own = Vector<Element, kVector>::load(rows, first + column);
  if constexpr (sizeof(Element) == 2) {
    if (tables.cos == nullptr || column >= 2 * tables.pairs) return own;
    int64_t const row = int64_t{angle} * tables.pairs;
    auto const turn = [](float own, float other, float cos, float sin, bool is_first) {
      float const x = __fmul_rn(own, cos);
      float const y = __fmul_rn(other, sin);
      return is_first ? __fsub_rn(x, y) : __fadd_rn(x, y);
    };
    Vector<Element, kVector> result;
    if (tables.interleaved) {
      constexpr int kPairs = kVector == 1 ? 1 : kVector / 2;
      float cos[kPairs], sin[kPairs];
      load_angles<Element>(tables, tables.cos, row + column / 2, cos);
      load_angles<Element>(tables, tables.sin, row + column / 2, sin);
      auto other = own;
      if constexpr (kVector == 1) {
        other = Vector<Element, kVector>::load(rows, first + (column ^ 1));
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        Element const x = other.x[kVector == 1 ? 0 : i ^ 1];
        round_to(result.x[i], turn(to_float(own.x[i]), to_float(x), cos[i / 2], sin[i / 2],
                                   (column + i) % 2 == 0));
      }
    } else {
      bool const is_first = column < tables.pairs;
      int const pair = is_first ? column : column - tables.pairs;
      int const other_column = is_first ? column + tables.pairs : pair;
      auto const other = Vector<Element, kVector>::load(rows, first + other_column);
      float cos[kVector], sin[kVector];
      load_angles<Element>(tables, tables.cos, row + pair, cos);
      load_angles<Element>(tables, tables.sin, row + pair, sin);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        round_to(result.x[i],
                 turn(to_float(own.x[i]), to_float(other.x[i]), cos[i], sin[i], is_first));
      }
    }
    return result;
  }
  return own;
}

template <class Element, class Stored, int kVector>
__device__ void write(Operand const& cache, decode::Scale const& scale, Place const& place,
                      int head, int column, Vector<Element, kVector> const& x) {
  int64_t const index = place.page * cache.batch_stride + place.slot * cache.seqlen_stride +
                        head * cache.head_stride + column;
  if constexpr (std::is_same_v<Element, Stored>) {
    x.store(cache.data, index);
  } else {
    float const by =
        scale.data == nullptr ? 1.f : *scale.at(place.sequence, head, place.page, place.slot);
    Vector<Stored, kVector> stored;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float const number = to_float(x.x[i]);
      float const quotient = number == 0.f ? 0.f : __fdiv_rn(number, by);
      stored.x[i] = __nv_cvt_float_to_fp8(quotient, __NV_SATFINITE, __NV_E4M3);
    }
    stored.store(cache.data, index);
  }
}

template <class Element, class Stored, int kVector>
__global__ void __launch_bounds__(kThreads) append_kernel(__grid_constant__ Params const params) {
  AppendProblem const& p = params.problem;
  // What is launched early waits before it reads what is written here.
  cudaTriggerProgrammaticLaunchCompletion();
  __shared__ Place places[kMostRows];
  int const first_row = static_cast<int>(blockIdx.x) * params.rows_of_cta;
  int const rows = min(params.rows_of_cta, p.sequences.rows - first_row);
  int const rows_of_warp = (rows + kWarps - 1) / kWarps;
  int const warp = threadIdx.x / 32;
  Finder finder(params);
  for (int i = warp * rows_of_warp; i < min((warp + 1) * rows_of_warp, rows); ++i) {
    Place const place = finder.find(first_row + i);
    if (threadIdx.x % 32 == 0) places[i] = place;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < rows * params.vectors.divisor; i += kThreads) {
    int const row_of_cta = params.vectors(i);
    int vector = i - row_of_cta * params.vectors.divisor;
    Place const& place = places[row_of_cta];
    int64_t const row = first_row + row_of_cta;
    bool const is_key = vector < params.key_vectors;
    vector -= is_key ? 0 : params.key_vectors;
    if (!is_key && vector < params.value_vectors) {
      if (!place.is_written) continue;
      int const head = params.head_v(vector);
      int const column = params.head_v.rest(vector) * kVector;
      int64_t const first = (row * p.num_heads_k + head) * p.head_dim_v;
      write<Element, Stored>(p.value_cache, p.value_scale, place, head, column,
                             Vector<Element, kVector>::load(p.value, first + column));
      continue;
    }
    if (is_key && !place.is_written) continue;
    vector -= is_key ? 0 : params.value_vectors;
    int const head = params.head(vector);
    int const column = params.head.rest(vector) * kVector;
    int const heads = is_key ? p.num_heads_k : p.num_heads_q;
    int64_t const first = (row * heads + head) * p.head_dim;
    auto x =
        turned<Element, kVector>(p.tables, is_key ? p.key : p.query, first, column, place.angle);
    if (is_key) {
      write<Element, Stored>(p.key_cache, p.key_scale, place, head, column, x);
    } else if constexpr (sizeof(Element) == 2) {
      for (int j = 0; place.is_mistaken && j < kVector; ++j) round_to(x.x[j], NAN);
      x.store(p.rotated_query, first + column);
    }
  }
}

// Whether all that is read and written comes in whole vectors of so many numbers.
bool has_vectors(AppendProblem const& p, int numbers, int element_bytes, int stored_bytes) {
  bool aligned = p.head_dim % numbers == 0 && p.head_dim_v % numbers == 0;
  auto const is_aligned = [](void const* data, int bytes) {
    return reinterpret_cast<uintptr_t>(data) % std::min(bytes, kVectorBytes) == 0;
  };
  for (void const* x : {p.key, p.value, p.query, static_cast<void const*>(p.rotated_query)}) {
    aligned &= is_aligned(x, numbers * element_bytes);
  }
  for (Operand const& x : {p.key_cache, p.value_cache}) {
    aligned &= is_aligned(x.data, numbers * stored_bytes);
    aligned &= (x.batch_stride | x.seqlen_stride | x.head_stride) % numbers == 0;
  }
  if (p.tables.cos == nullptr) return aligned;
  int const angles = p.tables.interleaved ? numbers / 2 : numbers;
  for (void const* x : {p.tables.cos, p.tables.sin}) {
    aligned &= is_aligned(x, angles * (p.tables.is_fp32 ? 4 : element_bytes));
  }
  return aligned && p.tables.pairs % angles == 0;
}

template <class Element, class Stored, int kVector>
cudaError_t launch(AppendProblem const& p, cudaStream_t stream) {
  int num_sms = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_sms));
  Params params{};
  params.problem = p;
  int const rows = p.sequences.rows;
  int const ctas = num_sms * kCtasPerSm;
  params.rows_of_cta = std::min(rows / ctas + (rows % ctas != 0), kMostRows);
  params.rows_each = decode::Divider(std::max(p.sequences.rows_each, 1));
  params.page_size = decode::Divider(p.page_size);
  params.head = decode::Divider(p.head_dim / kVector);
  params.head_v = decode::Divider(p.head_dim_v / kVector);
  params.key_vectors = p.num_heads_k * params.head.divisor;
  params.value_vectors = p.num_heads_k * params.head_v.divisor;
  int const query_vectors = p.query == nullptr ? 0 : p.num_heads_q * params.head.divisor;
  params.vectors = decode::Divider(params.key_vectors + params.value_vectors + query_vectors);
  int const grid = rows / params.rows_of_cta + (rows % params.rows_of_cta != 0);
  return launch_kernel(append_kernel<Element, Stored, kVector>, grid, kThreads, 0, params, stream);
}

template <class Element, class Stored>
cudaError_t launch(AppendProblem const& p, cudaStream_t stream) {
  constexpr int kVector = kVectorBytes / sizeof(Element);
  return has_vectors(p, kVector, sizeof(Element), sizeof(Stored))
             ? launch<Element, Stored, kVector>(p, stream)
             : launch<Element, Stored, 1>(p, stream);
}

template <class Element>
cudaError_t launch_16_bits(AppendProblem const& p, cudaStream_t stream) {
  return p.e4m3_cache ? launch<Element, uint8_t>(p, stream) : launch<Element, Element>(p, stream);
}

}  // namespace

cudaError_t launch_append(AppendProblem const& problem, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kBFloat16:
      return launch_16_bits<__nv_bfloat16>(problem, stream);
    case DType::kFloat16:
      return launch_16_bits<__half>(problem, stream);
    case DType::kFloat32:
      return launch<float, float>(problem, stream);
    case DType::kFloat8E4M3:
      return launch<uint8_t, uint8_t>(problem, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_fa3
