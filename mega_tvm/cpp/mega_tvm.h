// mega_tvm.h: loads and runs compiled models from C++17.
//
//   mega_tvm::Model model("model.so");
//   const mega_tvm::Entry& entry = model.entries()[0];
//   std::vector<float> x(entry.input_size()), y(entry.output_size());
//   model.run(entry, x.data(), y.data());
//
// Needs the headers of tvm-ffi and dlpack, libtvm_ffi.so and libtvm_runtime.so: a bundle holds them
// all. A compiled model is code: load what you trust. Lengths are checked here, digests are not;
// `sha256sum --check SHA256SUMS` does, or mega_tvm.load in Python.

#ifndef MEGA_TVM_H_
#define MEGA_TVM_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tvm::runtime::threading {
void SetMaxConcurrency(int value);  // libtvm_runtime.so exports it
}

namespace mega_tvm {

constexpr std::size_t kAlignment = 64;  // kernels read whole vectors

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// One shape that the model was compiled for; arrays are float32, in C order.
struct Entry {
  std::string name;
  std::vector<std::int64_t> input_shape;   // [B, T, embed]
  std::vector<std::int64_t> output_shape;  // [B, hidden]
  std::int64_t workspace;                  // bytes that a call needs for intermediates

  std::size_t input_size() const { return size(input_shape); }
  std::size_t output_size() const { return size(output_shape); }

 private:
  static std::size_t size(const std::vector<std::int64_t>& shape) {
    std::size_t count = 1;
    for (std::int64_t extent : shape) count *= static_cast<std::size_t>(extent);
    return count;
  }
};

// Aligned memory, and the DLTensor that describes it.
class Buffer {
 public:
  Buffer(std::vector<std::int64_t> shape, DLDataType type) : shape_(std::move(shape)) {
    bytes_ = type.bits / 8;
    for (std::int64_t extent : shape_) bytes_ *= static_cast<std::size_t>(extent);
    const std::size_t rounded = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    memory_.reset(std::aligned_alloc(kAlignment, rounded ? rounded : kAlignment));
    if (!memory_) throw std::bad_alloc();
    tensor_ = DLTensor{};
    tensor_.data = memory_.get();
    tensor_.device = {kDLCPU, 0};
    tensor_.ndim = static_cast<int>(shape_.size());
    tensor_.dtype = type;
    tensor_.shape = shape_.data();
    stride_.assign(shape_.size(), 1);
    for (std::size_t i = shape_.size(); i-- > 1;) stride_[i - 1] = stride_[i] * shape_[i];
    tensor_.strides = stride_.data();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() { return memory_.get(); }
  std::size_t bytes() const { return bytes_; }
  DLTensor* tensor() { return &tensor_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::vector<std::int64_t> shape_, stride_;
  std::size_t bytes_;
  std::unique_ptr<void, Free> memory_;
  DLTensor tensor_;
};

// A loaded model. Several threads may call it at once: each call has memory of its own.
class Model {
 public:
  // Throws Error if the file is not a compiled model for this CPU, or cannot be loaded.
  explicit Model(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(path + ": cannot be opened");
    const tvm::ffi::json::Object manifest = read_manifest(file, path);
    check_cpu(object(manifest, "target"), path);
    const tvm::ffi::json::Object tensors = object(manifest, "tensors");
    const std::int64_t bytes = number(tensors, "bytes");
    tensors_ = std::make_unique<Buffer>(std::vector<std::int64_t>{bytes > 0 ? bytes : 1}, kUint8);
    file.seekg(number(tensors, "offset"));
    if (!file.read(static_cast<char*>(tensors_->data()), bytes)) {
      throw Error(path + ": its tensors are cut off");
    }
    // dlopen looks a bare name up elsewhere.
    const std::string name = path.find('/') == std::string::npos ? "./" + path : path;
    try {
      module_ = tvm::ffi::Module::LoadFromFile(name);
    } catch (const tvm::ffi::Error& error) {
      throw Error(path + ": cannot be loaded: " + error.what());
    }
    for (const tvm::ffi::Any& item : array(manifest, "entries")) {
      add_entry(item.cast<tvm::ffi::json::Object>(), path);
    }
  }

  const std::vector<Entry>& entries() const { return entries_; }

  // Runs an entry on the calling thread. `x` holds entry.input_size() floats, `y` takes
  // entry.output_size(); neither needs an alignment. NaN and infinity propagate.
  void run(const Entry& entry, const float* x, float* y) {
    const std::size_t index = static_cast<std::size_t>(&entry - entries_.data());
    if (index >= entries_.size()) throw Error("the entry is not one of this model");
    std::unique_ptr<Frame> frame = take(index);
    std::memcpy(frame->x.data(), x, frame->x.bytes());
    tvm::runtime::threading::SetMaxConcurrency(1);
    const std::int64_t status =
        functions_[index](frame->x.tensor(), tensors_->tensor(), frame->workspace.tensor(),
                          frame->y.tensor())
            .cast<std::int64_t>();
    if (status != 0) throw std::bad_alloc();
    std::memcpy(y, frame->y.data(), frame->y.bytes());
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_[index].push_back(std::move(frame));
  }

 private:
  static constexpr DLDataType kUint8{kDLUInt, 8, 1};
  static constexpr DLDataType kFloat32{kDLFloat, 32, 1};

  // What one running call has to itself.
  struct Frame {
    explicit Frame(const Entry& entry)
        : x(entry.input_shape, kFloat32),
          workspace({entry.workspace}, kUint8),
          y(entry.output_shape, kFloat32) {}
    Buffer x, workspace, y;
  };

  std::unique_ptr<Frame> take(std::size_t index) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_[index].empty()) {
        std::unique_ptr<Frame> frame = std::move(idle_[index].back());
        idle_[index].pop_back();
        return frame;
      }
    }
    return std::make_unique<Frame>(entries_[index]);
  }

  // The file ends in: manifest (JSON) | its sha256, 32 bytes | its length, u64 | "MEGATVM1".
  static tvm::ffi::json::Object read_manifest(std::ifstream& file, const std::string& path) {
    char footer[48];
    file.seekg(0, std::ios::end);
    const std::int64_t size = file.tellg();
    if (size >= 48) file.seekg(size - 48);
    if (size < 48 || !file.read(footer, 48) || std::memcmp(footer + 40, "MEGATVM1", 8) != 0) {
      throw Error(path + ": not a compiled model, or cut off");
    }
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(footer[32 + i]);
    if (length > static_cast<std::uint64_t>(size) - 48) throw Error(path + ": is damaged");
    std::string text(length, '\0');
    file.seekg(size - 48 - static_cast<std::int64_t>(length));
    tvm::ffi::String message;
    if (!file.read(text.data(), static_cast<std::streamsize>(length))) {
      throw Error(path + ": cannot be read");
    }
    try {
      auto manifest =
          tvm::ffi::json::Parse(text, &message).cast<tvm::ffi::json::Object>();
      if (number(manifest, "format_version") != 1) {
        throw Error(path + ": of another format version; compile the model again");
      }
      const tvm::ffi::json::Object tensors = object(manifest, "tensors");
      if (number(tensors, "bytes") < 0 || number(tensors, "offset") + number(tensors, "bytes") !=
                                              size - 48 - static_cast<std::int64_t>(length)) {
        throw Error(path + ": is damaged");
      }
      return manifest;
    } catch (const tvm::ffi::Error& error) {
      throw Error(path + ": its manifest is damaged: " + error.what());
    }
  }

  static void check_cpu(const tvm::ffi::json::Object& target, const std::string& path) {
    std::ifstream info("/proc/cpuinfo");
    std::string line, flags;
    while (std::getline(info, line)) {
      if (line.rfind("flags", 0) == 0) {
        flags = line.substr(line.find(':') + 1) + " ";
        break;
      }
    }
    for (const tvm::ffi::Any& item : array(target, "cpu_features")) {
      const std::string feature = item.cast<std::string>();
      if (flags.find(" " + feature + " ") == std::string::npos) {
        throw Error(path + ": this CPU lacks " + feature + "; compile the model for this machine");
      }
      // Such code needs a permission of the system's, which the Python runtime asks for.
      if (feature == "amx_tile") throw Error(path + ": AMX models run from Python only");
    }
  }

  void add_entry(const tvm::ffi::json::Object& fields, const std::string& path) {
    Entry entry;
    entry.name = fields.at("name").cast<std::string>();
    entry.input_shape = shape(object(fields, "input"));
    entry.output_shape = shape(object(fields, "output"));
    entry.workspace = number(fields, "workspace");
    const auto function = module_.value()->GetFunction(entry.name + "__run", true);
    if (!function.has_value()) throw Error(path + ": the library lacks its entry " + entry.name);
    functions_.push_back(function.value());
    entries_.push_back(std::move(entry));
    idle_.emplace_back();
  }

  static std::vector<std::int64_t> shape(const tvm::ffi::json::Object& fields) {
    std::vector<std::int64_t> extents;
    for (const tvm::ffi::Any& extent : array(fields, "shape")) {
      extents.push_back(extent.cast<std::int64_t>());
    }
    return extents;
  }
  static std::int64_t number(const tvm::ffi::json::Object& from, const char* name) {
    return from.at(tvm::ffi::String(name)).cast<std::int64_t>();
  }
  static tvm::ffi::json::Object object(const tvm::ffi::json::Object& from, const char* name) {
    return from.at(tvm::ffi::String(name)).cast<tvm::ffi::json::Object>();
  }
  static tvm::ffi::json::Array array(const tvm::ffi::json::Object& from, const char* name) {
    return from.at(tvm::ffi::String(name)).cast<tvm::ffi::json::Array>();
  }

  std::unique_ptr<Buffer> tensors_;
  tvm::ffi::Optional<tvm::ffi::Module> module_;
  std::vector<Entry> entries_;
  std::vector<tvm::ffi::Function> functions_;
  std::vector<std::vector<std::unique_ptr<Frame>>> idle_;
  std::mutex mutex_;
};

}  // namespace mega_tvm

#endif  // MEGA_TVM_H_
