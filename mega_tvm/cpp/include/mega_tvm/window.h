// A full run on the last frames, at each new frame.

#ifndef MEGA_TVM_WINDOW_H_
#define MEGA_TVM_WINDOW_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "model.h"

namespace mega_tvm {

// An array [batch, length, width] that drops its oldest rows as new ones come. It starts one row
// further on for each new one: a batch's rows stay where they are, and its new row takes the place
// of the next one's oldest. At the end of the memory all move back to its start.
class SlidingRows {
 public:
  SlidingRows(std::int64_t batch, std::int64_t length, std::int64_t width)
      : shape_(manifest::checked(Shape{batch, length, width})),
        memory_(kFloat32, manifest::checked(Shape{batch + 1, length, width})) {
    std::fill_n(memory_.floats(), (batch + 1) * length * width, 0.0f);
    strides_ = {length * width, width, 1};
    tensor_ = *memory_.tensor();
    tensor_.ndim = 3;
    tensor_.shape = shape_.data();
    tensor_.strides = strides_.data();
  }
  SlidingRows(const SlidingRows&) = delete;
  SlidingRows& operator=(const SlidingRows&) = delete;

  // [batch, length, width], the newest last: valid until the next append.
  const float* floats() const { return static_cast<const float*>(tensor_.data); }
  DLTensor* tensor() { return &tensor_; }

  // Adds rows [batch, n, width], n up to the length, in place of the n oldest.
  void append(const float* rows, std::int64_t n) {
    const std::int64_t batch = shape_[0], length = shape_[1], width = shape_[2];
    if (start_ + n <= length) {
      start_ += n;
    } else {
      std::memmove(memory_.floats(), memory_.floats() + (start_ + n) * width,
                   static_cast<std::size_t>((batch * length - n) * width) * sizeof(float));
      start_ = 0;
    }
    float* first = memory_.floats() + start_ * width;
    tensor_.data = first;
    const std::size_t floats = static_cast<std::size_t>(n * width);
    for (std::int64_t i = 0; i < batch; ++i) {
      std::memcpy(first + ((i + 1) * length - n) * width, rows + i * n * width,
                  floats * sizeof(float));
    }
  }

 private:
  Shape shape_, strides_;
  std::int64_t start_ = 0;  // row
  Buffer memory_;
  DLTensor tensor_{};
};

// The last `seq_len` frames of `batch` rows. The output is that of a full run on them, to the bit;
// what a frame keeps as the window slides is computed once. It is for one thread at a time, and
// must not outlive its model.
class Window {
 public:
  // Without `seq_len`, that of the first compiled shape. Throws Error if the model does not run
  // the window's shape.
  explicit Window(Model& model, std::int64_t batch = 1, std::int64_t seq_len = 0)
      : model_(model), entry_(model.entry_at(shape_of(model, batch, seq_len))) {
    frames_ = std::make_unique<SlidingRows>(entry_.input_shape[0], entry_.input_shape[1],
                                            entry_.input_shape[2]);
    try {
      describe();
    } catch (const tvm::ffi::Error& error) {
      throw Error(model.path_ + ": its manifest is damaged: " + error.what());
    }
  }

  std::int64_t length() const { return length_; }  // frames that it holds
  std::size_t output_size() const { return entry_.output_size(); }

  // Adds one frame to each row, x [batch, width], drops the oldest if the window is full, and runs
  // the model. Until it is full the run is on the frames so far; throws Error if the model does not
  // run that many, and the window is as before.
  void push(const float* x, float* y) {
    const std::int64_t length = std::min(length_ + 1, entry_.input_shape[1]);
    if (length < entry_.input_shape[1]) {
      const Shape shape{entry_.input_shape[0], length, entry_.input_shape[2]};
      model_.entry_at(shape);
      add(x, 1);
      const std::vector<float> so_far = frames();
      return model_.run(shape, so_far.data(), y);
    }
    add(x, 1);
    if (rows_.empty()) return model_.run(entry_.input_shape, frames_->floats(), y);
    keep_rows();
    model_.call(rest_, rest_arguments_.data(), static_cast<int>(rest_arguments_.size()));
    std::memcpy(y, y_->data(), y_->bytes());
  }

  // Adds frames without a run, x [batch, n, width]: those at hand at the start, or missed ones.
  void fill(const float* x, std::int64_t n) {
    const std::int64_t batch = entry_.input_shape[0], most = entry_.input_shape[1];
    const std::int64_t width = entry_.input_shape[2], kept = std::min(n, most);
    std::vector<float> last;  // [batch, kept, width]
    for (std::int64_t i = 0; i < batch; ++i) {
      const float* end = x + (i + 1) * n * width;
      last.insert(last.end(), end - kept * width, end);
    }
    if (kept > 0) add(last.data(), kept);
  }

  // Drops all frames.
  void reset() { length_ = new_ = 0; }

  // The frames that it holds, [batch, length(), width].
  std::vector<float> frames() const { return newest(length_); }

 private:
  static Shape shape_of(const Model& model, std::int64_t batch, std::int64_t seq_len) {
    const Shape& first = model.entries().at(0).input_shape;
    if (first.size() != 3) throw Error("expected a model of [batch, seq_len, embed]");
    return {batch, seq_len == 0 ? first[1] : seq_len, first[2]};
  }

  // A function of known shapes checks that its workspace has the very bytes that it needs.
  static std::int64_t exact(const Workspace& workspace, const Sizes& sizes) {
    return std::max<std::int64_t>(1, workspace.bytes(sizes) - 1);
  }

  void describe() {
    const tvm::ffi::String field("window"), name(entry_.name);
    if (!model_.manifest_.count(field)) return;  // an older compiler's
    const auto window = model_.manifest_.at(field).cast<manifest::json::Object>();
    if (window.count(tvm::ffi::String("left_out"))) return;
    const auto entries = manifest::object(window, "entries");
    if (!entries.count(name)) return;
    const auto rest = manifest::object(entries, entry_.name.c_str());
    frame_rows_ = model_.function(manifest::text(window, "name"));
    rest_ = model_.function(manifest::text(rest, "name"));
    frame_workspace_ = Workspace::of(manifest::object(window, "workspace"));
    const Sizes sizes{{"batch", entry_.input_shape[0]}, {"seq_len", entry_.input_shape[1]}};
    const Workspace workspace = Workspace::of(manifest::object(rest, "workspace"));
    workspace_ = std::make_unique<Buffer>(kUint8, Shape{exact(workspace, sizes)});
    y_ = std::make_unique<Buffer>(kFloat32, manifest::checked(entry_.output_shape));
    for (std::int64_t width : manifest::shape(manifest::array(window, "widths"))) {
      widths_.push_back(width);
      rows_.push_back(
          std::make_unique<SlidingRows>(entry_.input_shape[0], entry_.input_shape[1], width));
      found_.push_back(std::make_unique<Buffer>(kFloat32));
      rest_arguments_.push_back(rows_.back()->tensor());
    }
    for (Buffer* last : {model_.tensors_.get(), workspace_.get(), y_.get()}) {
      rest_arguments_.push_back(last->tensor());
    }
  }

  void add(const float* x, std::int64_t n) {
    frames_->append(x, n);
    length_ = std::min(length_ + n, entry_.input_shape[1]);
    new_ = std::min(new_ + n, entry_.input_shape[1]);
  }

  // The last n frames of each row.
  std::vector<float> newest(std::int64_t n) const {
    const std::int64_t width = entry_.input_shape[2];
    std::vector<float> found;
    for (std::int64_t i = 0; i < entry_.input_shape[0]; ++i) {
      const float* end = frames_->floats() + (i + 1) * entry_.input_shape[1] * width;
      found.insert(found.end(), end - n * width, end);
    }
    return found;
  }

  // Computes what the frames since the last run keep.
  void keep_rows() {
    if (new_ != prepared_) prepare();
    const std::int64_t width = entry_.input_shape[2];
    for (std::int64_t i = 0; i < entry_.input_shape[0]; ++i) {
      const float* end = frames_->floats() + (i + 1) * entry_.input_shape[1] * width;
      std::copy(end - new_ * width, end, x_.floats() + i * new_ * width);
    }
    model_.call(frame_rows_, arguments_.data(), static_cast<int>(arguments_.size()));
    for (std::size_t i = 0; i < found_.size(); ++i) rows_[i]->append(found_[i]->floats(), new_);
    new_ = 0;
  }

  // Makes room for as many frames: nearly always for one, as the time before.
  void prepare() {
    const std::int64_t batch = entry_.input_shape[0];
    x_.resize({batch, new_, entry_.input_shape[2]});
    frame_memory_.resize(exact(frame_workspace_, {{"batch", batch}, {"seq_len", new_}}));
    arguments_ = {x_.tensor(), model_.tensors_->tensor(), frame_memory_.tensor()};
    for (std::size_t i = 0; i < found_.size(); ++i) {
      found_[i]->resize({batch, new_, widths_[i]});
      arguments_.push_back(found_[i]->tensor());
    }
    prepared_ = new_;
  }

  Model& model_;
  Entry entry_;
  std::int64_t length_ = 0;
  std::int64_t new_ = 0, prepared_ = 0;  // frames since rows were last kept; that there is room for
  std::unique_ptr<SlidingRows> frames_;
  tvm::ffi::Function frame_rows_, rest_;
  Workspace frame_workspace_;
  std::vector<std::int64_t> widths_;
  std::vector<std::unique_ptr<SlidingRows>> rows_;  // what frames keep; empty: full runs
  std::vector<std::unique_ptr<Buffer>> found_;      // the same of new frames
  Buffer x_{kFloat32}, frame_memory_{kUint8};
  std::unique_ptr<Buffer> workspace_, y_;
  std::vector<tvm::ffi::AnyView> arguments_, rest_arguments_;
};

}  // namespace mega_tvm

#endif  // MEGA_TVM_WINDOW_H_
