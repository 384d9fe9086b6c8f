// A model fed frame by frame, at the cost of the new frames alone.

#ifndef MEGA_TVM_STREAM_H_
#define MEGA_TVM_STREAM_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "model.h"

namespace mega_tvm {

// State for `batch` rows, each with a length of its own. After any split of frames over calls, the
// output is that of a full run on all frames of the row so far, up to the order of sums. It is for
// one thread at a time, and must not outlive its model. All memory is allocated at the start.
class Stream {
 public:
  enum class OnFull { kError, kSlide };  // at `max_len` frames; sliding: attention to the last ones

  // Throws Error if the model cannot stream.
  Stream(Model& model, std::int64_t batch, std::int64_t max_len, OnFull on_full = OnFull::kError)
      : model_(model), batch_(batch), max_len_(max_len), slides_(on_full == OnFull::kSlide) {
    if (batch < 1 || max_len < 1) throw Error("batch and max_len must be positive");
    piece_ = std::max<std::int64_t>(1, kPrefillRows / batch);
    try {
      describe();
    } catch (const tvm::ffi::Error& error) {
      throw Error(model.path_ + ": its manifest is damaged: " + error.what());
    }
    reset();
  }

  std::int64_t batch() const { return batch_; }
  std::int64_t max_len() const { return max_len_; }
  std::int64_t input_width() const { return width_; }              // of a frame
  std::size_t output_size() const { return count(output_shape_); }  // of all rows
  // Frames that a row has seen since its reset.
  std::int64_t length(std::int64_t row) const { return lengths()[check_row(row)]; }

  // Feeds one frame to each row: x [batch, input_width] -> y [batch, ...]. Throws Error if a row
  // is full and the stream does not slide; the state is as before.
  void step(const float* x, float* y) { prefill(x, 1, y); }

  // Feeds n frames to each row: x [batch, n, input_width]; y is the output behind the last ones.
  void prefill(const float* x, std::int64_t n, float* y) {
    if (n < 1) throw Error("expected at least one frame, found " + std::to_string(n));
    const std::int64_t longest = *std::max_element(lengths(), lengths() + batch_);
    if (!slides_ && n > max_len_ - longest) {
      throw Error(std::to_string(n) + " more frame(s) do not fit: the longest row holds " +
                  std::to_string(longest) + " of max_len=" + std::to_string(max_len_) +
                  "; reset() rows whose sequence has ended, or make the stream with a larger "
                  "max_len, or with OnFull::kSlide");
    }
    for (std::int64_t done = 0; done < n;) {
      // A piece must not wrap around a cache: its first queries would miss rows that its last
      // frames have replaced. Full caches take one frame at a time.
      const std::int64_t room = std::max<std::int64_t>(1, max_len_ - (longest + done));
      const std::int64_t frames = std::min({n - done, piece_, room});
      feed(x + done * width_, n, frames);
      done += frames;
    }
    std::memcpy(y, y_->data(), y_->bytes());
  }

  // A copy of the state, for restore(); it stays as it is.
  class Snapshot {
    friend class Stream;
    const Model* model;
    std::int64_t batch, max_len, used;  // used: frames of each cache
    bool slides;
    std::vector<std::int64_t> lengths;
    std::vector<std::vector<float>> states;
  };

  Snapshot snapshot() const {
    Snapshot kept;
    kept.model = &model_;
    kept.batch = batch_;
    kept.max_len = max_len_;
    kept.slides = slides_;
    kept.lengths.assign(lengths(), lengths() + batch_);
    kept.used = std::min(*std::max_element(lengths(), lengths() + batch_), max_len_);
    for (const State& state : states_) {
      const std::int64_t size = (state.cache ? kept.used : 1) * state.width;
      std::vector<float> copy;
      copy.reserve(static_cast<std::size_t>(batch_ * size));
      for (std::int64_t row = 0; row < batch_; ++row) {
        const float* start = state.memory->floats() + row * row_size(state);
        copy.insert(copy.end(), start, start + size);
      }
      kept.states.push_back(std::move(copy));
    }
    return kept;
  }

  // Goes on from a snapshot of this stream, or of another of its model with its batch, max_len and
  // OnFull. Throws Error if it is of another kind; the state is as before.
  void restore(const Snapshot& kept) {
    if (kept.model != &model_ || kept.batch != batch_ || kept.max_len != max_len_ ||
        kept.slides != slides_) {
      throw Error("expected a snapshot of a stream with the same model, batch, max_len and OnFull");
    }
    for (std::int64_t row = 0; row < batch_; ++row) take(kept, row, row);
  }

  // Lets each row i go on from row rows[i], for the beams of a search; a row may stand there more
  // than once. The state is held twice meanwhile.
  void reorder(const std::vector<std::int64_t>& rows) {
    if (static_cast<std::int64_t>(rows.size()) != batch_) {
      throw Error("expected " + std::to_string(batch_) + " rows, found " +
                  std::to_string(rows.size()));
    }
    for (std::int64_t row : rows) check_row(row);
    const Snapshot kept = snapshot();
    for (std::int64_t row = 0; row < batch_; ++row) {
      if (rows[row] != row) take(kept, rows[row], row);
    }
  }

  // Lets all rows start anew, or one.
  void reset() {
    for (std::int64_t row = 0; row < batch_; ++row) reset(row);
  }
  void reset(std::int64_t row) {
    lengths()[check_row(row)] = 0;
    for (const State& state : states_) {
      if (state.cache) continue;  // its rows beyond the length are not read
      std::fill_n(state.memory->floats() + row * state.width, state.width, 0.0f);
    }
  }

 private:
  // Rows times frames of a call: enough for full register tiles, few enough to stay in L2.
  static constexpr std::int64_t kPrefillRows = 128;

  struct State {
    bool cache;
    std::int64_t width;
    std::unique_ptr<Buffer> memory;
  };

  // Floats of a row.
  std::int64_t row_size(const State& state) const {
    return (state.cache ? max_len_ : 1) * state.width;
  }

  // Lets a row go on from one of a snapshot.
  void take(const Snapshot& kept, std::int64_t source, std::int64_t row) {
    lengths()[row] = kept.lengths[source];
    for (std::size_t i = 0; i < states_.size(); ++i) {
      const State& state = states_[i];
      const std::int64_t size = (state.cache ? kept.used : 1) * state.width;
      std::copy_n(kept.states[i].data() + source * size, size,
                  state.memory->floats() + row * row_size(state));
    }
  }

  void describe() {
    const tvm::ffi::String field("stream");
    if (!model_.manifest_.count(field)) throw Error("this model cannot stream: an older compiler's");
    const auto stream = model_.manifest_.at(field).cast<manifest::json::Object>();
    if (stream.count(tvm::ffi::String("left_out"))) {
      throw Error("this model cannot stream: " + manifest::text(stream, "left_out"));
    }
    function_ = model_.function(manifest::text(stream, "name"));
    width_ = manifest::number(stream, "input_width", 1);
    output_shape_ = manifest::shape(manifest::array(stream, "output_shape"));
    output_shape_.insert(output_shape_.begin(), batch_);
    for (const tvm::ffi::Any& item : manifest::array(stream, "state")) {
      const auto fields = item.cast<manifest::json::Object>();
      const bool cache = manifest::text(fields, "kind") == "cache";
      const std::int64_t width = manifest::number(fields, "width", 1);
      const Shape shape = cache ? Shape{batch_, max_len_, width} : Shape{batch_, width};
      states_.push_back(
          {cache, width, std::make_unique<Buffer>(kFloat32, manifest::checked(shape))});
    }
    const Workspace workspace = Workspace::of(manifest::object(stream, "workspace"));
    const Sizes sizes{{"batch", batch_}, {"seq_len", piece_}};
    workspace_ = std::make_unique<Buffer>(kUint8, Shape{workspace.bytes(sizes)});
    lengths_ = std::make_unique<Buffer>(kInt64, Shape{batch_});
    x_ = std::make_unique<Buffer>(kFloat32, manifest::checked(Shape{batch_, piece_, width_}));
    y_ = std::make_unique<Buffer>(kFloat32, manifest::checked(output_shape_));
    arguments_ = {x_->tensor(), lengths_->tensor()};
    for (const State& state : states_) arguments_.push_back(state.memory->tensor());
    for (Buffer* last : {model_.tensors_.get(), workspace_.get(), y_.get()}) {
      arguments_.push_back(last->tensor());
    }
  }

  // `x` is at each row's next frame; a row has n of them.
  void feed(const float* x, std::int64_t n, std::int64_t frames) {
    if (frames != frames_) x_->resize({batch_, frames, width_});
    frames_ = frames;
    const std::size_t row = static_cast<std::size_t>(frames * width_);
    for (std::int64_t i = 0; i < batch_; ++i) {
      std::memcpy(x_->floats() + i * row, x + i * n * width_, row * sizeof(float));
    }
    model_.call(function_, arguments_.data(), static_cast<int>(arguments_.size()));
    for (std::int64_t i = 0; i < batch_; ++i) lengths()[i] += frames;
  }

  std::int64_t* lengths() const { return static_cast<std::int64_t*>(lengths_->data()); }
  std::int64_t check_row(std::int64_t row) const {
    if (row < 0 || row >= batch_) throw Error("there is no row " + std::to_string(row));
    return row;
  }

  Model& model_;
  std::int64_t batch_, max_len_;
  bool slides_;
  std::int64_t piece_ = 1, width_ = 1, frames_ = 0;  // frames_: in x_
  Shape output_shape_;
  tvm::ffi::Function function_;
  std::vector<State> states_;
  std::unique_ptr<Buffer> lengths_, x_, y_, workspace_;
  std::vector<tvm::ffi::AnyView> arguments_;
};

}  // namespace mega_tvm

#endif  // MEGA_TVM_STREAM_H_
