// Memory that kernels can use.

#ifndef MEGA_TVM_BUFFER_H_
#define MEGA_TVM_BUFFER_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace mega_tvm {

using Shape = std::vector<std::int64_t>;

constexpr std::size_t kAlignment = 64;  // kernels read whole vectors
constexpr DLDataType kUint8{kDLUInt, 8, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr DLDataType kFloat32{kDLFloat, 32, 1};

inline std::size_t count(const Shape& shape) {
  std::size_t product = 1;
  for (std::int64_t extent : shape) product *= static_cast<std::size_t>(extent);
  return product;
}

// Aligned memory, and the DLTensor that describes it.
class Buffer {
 public:
  explicit Buffer(DLDataType type) { tensor_.dtype = type; }
  Buffer(DLDataType type, const Shape& shape) : Buffer(type) { resize(shape); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Memory only grows, by half at least; what was in it is lost then.
  void resize(const Shape& shape) {
    if (memory_ && shape == shape_) return;
    const std::size_t bytes = count(shape) * (tensor_.dtype.bits / 8);
    if (!memory_ || bytes > capacity_) {
      const std::size_t wanted = bytes > capacity_ * 3 / 2 ? bytes : capacity_ * 3 / 2;
      const std::size_t rounded = (wanted / kAlignment + 1) * kAlignment;
      memory_.reset();  // only one at a time
      capacity_ = 0;
      memory_.reset(std::aligned_alloc(kAlignment, rounded));
      if (!memory_) throw std::bad_alloc();
      capacity_ = rounded;
    }
    shape_ = shape;
    strides_.assign(shape_.size(), 1);
    for (std::size_t i = shape_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * shape_[i];
    bytes_ = bytes;
    tensor_.data = memory_.get();
    tensor_.device = {kDLCPU, 0};
    tensor_.ndim = static_cast<int>(shape_.size());
    tensor_.shape = shape_.data();
    tensor_.strides = strides_.data();
  }

  void resize(std::int64_t extent) {
    if (!memory_ || shape_.size() != 1 || shape_[0] != extent) resize(Shape{extent});
  }

  void* data() { return memory_.get(); }
  float* floats() { return static_cast<float*>(memory_.get()); }
  std::size_t bytes() const { return bytes_; }
  DLTensor* tensor() { return &tensor_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  Shape shape_, strides_;
  std::size_t bytes_ = 0, capacity_ = 0;
  std::unique_ptr<void, Free> memory_;
  DLTensor tensor_{};
};

}  // namespace mega_tvm

#endif  // MEGA_TVM_BUFFER_H_
