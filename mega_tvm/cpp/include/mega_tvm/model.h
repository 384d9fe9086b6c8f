// A loaded model.

#ifndef MEGA_TVM_MODEL_H_
#define MEGA_TVM_MODEL_H_

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "artifact.h"
#include "buffer.h"
#include "entry.h"
#include "threads.h"

namespace mega_tvm {

// Several threads may call it at once: each call has memory of its own.
class Model {
 public:
  // A call uses `num_threads` threads, the caller's included; not more than the process has CPUs.
  // Throws Error if the file is not a compiled model for this CPU, or cannot be loaded.
  explicit Model(const std::string& path, int num_threads = 1)
      : path_(path), num_threads_(prepare_threads(num_threads)) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(path + ": cannot be opened");
    try {
      manifest_ = manifest::read(file, path);
      manifest::check_cpu(manifest_, path);
      for (const tvm::ffi::Any& item : manifest::array(manifest_, "entries")) {
        entries_.push_back(Entry::of(item.cast<manifest::json::Object>()));
      }
      if (manifest_.count(tvm::ffi::String("symbolic_entries"))) {
        for (const tvm::ffi::Any& item : manifest::array(manifest_, "symbolic_entries")) {
          symbolic_.push_back(SymbolicEntry::of(item.cast<manifest::json::Object>()));
        }
      }
      read_tensors(file);
    } catch (const tvm::ffi::Error& error) {
      throw Error(path + ": its manifest is damaged: " + error.what());
    } catch (const Error& error) {
      const std::string message = error.what();
      throw Error(message.rfind(path, 0) == 0 ? message : path + ": its manifest " + message);
    }
    // dlopen looks a bare name up elsewhere.
    const std::string name = path.find('/') == std::string::npos ? "./" + path : path;
    try {
      module_ = tvm::ffi::Module::LoadFromFile(name);
    } catch (const tvm::ffi::Error& error) {
      throw Error(path + ": cannot be loaded: " + error.what());
    }
    for (const Entry& entry : entries_) runners_.push_back({function(entry.name), {}});
    for (const SymbolicEntry& entry : symbolic_) runners_.push_back({function(entry.name()), {}});
  }

  // The shapes that the model was compiled for.
  const std::vector<Entry>& entries() const { return entries_; }
  // What runs batches and lengths that no entry of entries() has; may be empty.
  const std::vector<SymbolicEntry>& symbolic_entries() const { return symbolic_; }
  int num_threads() const { return num_threads_; }

  // What runs an input of some shape: an entry of it alone, else a symbolic one's. Throws Error if
  // none does; the message lists what there is.
  Entry entry_at(const Shape& shape) const {
    std::optional<Entry> made;
    return *find(shape, made).second;
  }

  // Runs an input of some shape on the calling thread. `x` holds entry_at(shape).input_size()
  // floats, `y` takes output_size(); neither needs an alignment. NaN and infinity propagate.
  void run(const Shape& shape, const float* x, float* y) {
    std::optional<Entry> made;
    const auto [index, entry] = find(shape, made);
    Runner& runner = runners_[index];
    std::unique_ptr<Frame> frame = take(runner);
    frame->x.resize(entry->input_shape);
    frame->workspace.resize(entry->workspace);
    frame->y.resize(entry->output_shape);
    std::memcpy(frame->x.data(), x, frame->x.bytes());
    const tvm::ffi::AnyView arguments[] = {frame->x.tensor(), tensors_->tensor(),
                                           frame->workspace.tensor(), frame->y.tensor()};
    call(runner.function, arguments, 4);
    std::memcpy(y, frame->y.data(), frame->y.bytes());
    const std::lock_guard<std::mutex> lock(mutex_);
    runner.idle.push_back(std::move(frame));
  }

 private:
  friend class Stream;
  friend class Window;

  // What one running call has to itself; those of a symbolic entry serve all its shapes.
  struct Frame {
    Buffer x{kFloat32}, workspace{kUint8}, y{kFloat32};
  };
  struct Runner {
    tvm::ffi::Function function;
    std::vector<std::unique_ptr<Frame>> idle;
  };

  void read_tensors(std::ifstream& file) {
    const manifest::json::Object tensors = manifest::object(manifest_, "tensors");
    const std::int64_t bytes = manifest::number(tensors, "bytes");
    tensors_ = std::make_unique<Buffer>(kUint8, Shape{bytes > 0 ? bytes : 1});
    file.seekg(manifest::number(tensors, "offset"));
    if (!file.read(static_cast<char*>(tensors_->data()), bytes)) {
      throw Error(path_ + ": its tensors are cut off");
    }
  }

  tvm::ffi::Function function(const std::string& name) const {
    const auto found = module_.value()->GetFunction(name + "__run", true);
    if (!found.has_value()) throw Error(path_ + ": the library lacks its entry " + name);
    return found.value();
  }

  // Returns the place of its runner, and the entry: a symbolic one lies in `made`.
  std::pair<std::size_t, const Entry*> find(const Shape& shape, std::optional<Entry>& made) const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].input_shape == shape) return {i, &entries_[i]};
    }
    for (std::size_t i = 0; i < symbolic_.size(); ++i) {
      made = symbolic_[i].at(shape);
      if (made) return {entries_.size() + i, &*made};
    }
    std::string known;
    for (const Entry& entry : entries_) known += to_string(entry.input_shape) + " or ";
    for (const SymbolicEntry& entry : symbolic_) known += entry.describe() + " or ";
    throw Error("expected an array of shape " + known.substr(0, known.size() - 4) + ", found " +
                to_string(shape) + "; reshape it, or compile the model for this batch and length");
  }

  std::unique_ptr<Frame> take(Runner& runner) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (runner.idle.empty()) return std::make_unique<Frame>();
    std::unique_ptr<Frame> frame = std::move(runner.idle.back());
    runner.idle.pop_back();
    return frame;
  }

  void call(const tvm::ffi::Function& function, const tvm::ffi::AnyView* arguments, int n) const {
    tvm::ffi::Any status;
    use_threads(num_threads_);
    try {
      function.CallPacked(arguments, n, &status);
    } catch (const tvm::ffi::Error& error) {  // the library's own checks
      throw Error(path_ + ": the library does not take what its manifest says: " + error.what());
    }
    if (status.cast<std::int64_t>() != 0) throw std::bad_alloc();
  }

  std::string path_;
  int num_threads_;
  manifest::json::Object manifest_;
  std::unique_ptr<Buffer> tensors_;
  tvm::ffi::Optional<tvm::ffi::Module> module_;
  std::vector<Entry> entries_;
  std::vector<SymbolicEntry> symbolic_;
  std::vector<Runner> runners_;  // of entries_, then of symbolic_
  std::mutex mutex_;
};

}  // namespace mega_tvm

#endif  // MEGA_TVM_MODEL_H_
