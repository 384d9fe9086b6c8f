// Calls of mega_tvm.h that the example does not make; prints what goes wrong, and "done".
//
// check_header MODEL.so: a model of frames of width 13, with symbolic entries and streams.

#include <mega_tvm.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

// Counts what all libraries of this process allocate: glibc's functions under another name.
namespace {
std::atomic<long> allocations{0};
}
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);
void* malloc(std::size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* memory, std::size_t size) {
  ++allocations;
  return __libc_realloc(memory, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
}

namespace {

constexpr std::int64_t kWidth = 13;

void expect(bool right, const std::string& what) {
  if (!right) std::printf("wrong: %s\n", what.c_str());
}

template <typename Call>
void expect_error(const std::string& words, Call call) {
  try {
    call();
    std::printf("no error: %s\n", words.c_str());
  } catch (const mega_tvm::Error& error) {
    expect(std::string(error.what()).find(words) != std::string::npos,
           words + " is not in " + error.what());
  }
}

std::vector<float> random(std::size_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<float> run(mega_tvm::Model& model, const mega_tvm::Shape& shape,
                       const std::vector<float>& x) {
  std::vector<float> y(model.entry_at(shape).output_size());
  model.run(shape, x.data(), y.data());
  return y;
}

bool close(const float* a, const std::vector<float>& b) {
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) < 1e-5f)) return false;
  }
  return true;
}

// Many threads and mixed shapes: equal to serial runs, to the bit.
void check_threads(mega_tvm::Model& model) {
  std::vector<mega_tvm::Shape> shapes = {{3, 11, kWidth}, {1, 40, kWidth}, {2, 1, kWidth}};
  for (const mega_tvm::Entry& entry : model.entries()) shapes.push_back(entry.input_shape);
  std::vector<std::vector<float>> inputs, expected;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    inputs.push_back(random(mega_tvm::count(shapes[i]), static_cast<unsigned>(i)));
    expected.push_back(run(model, shapes[i], inputs[i]));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::size_t seed = 0; seed < 8; ++seed) {
    threads.emplace_back([&, seed] {
      for (std::size_t call = 0; call < 100; ++call) {
        const std::size_t i = (seed + call * 5) % shapes.size();
        if (run(model, shapes[i], inputs[i]) != expected[i]) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(wrong == 0, std::to_string(wrong) + " calls among many threads");
}

// Rows of different lengths, pieces of any size, and a row that starts anew.
void check_stream(mega_tvm::Model& model) {
  using mega_tvm::Stream;
  mega_tvm::Stream stream(model, 2, 300);
  const std::vector<float> first = random(150 * kWidth, 1), second = random(150 * kWidth, 2);
  const std::size_t hidden = stream.output_size() / 2;
  std::vector<float> y(stream.output_size());
  std::int64_t t = 0, start = 0;  // `start`: where the second row starts
  for (std::int64_t n : {100, 1, 1, 7, 1, 40}) {
    if (n == 7) {
      stream.reset(1);
      start = t;
    }
    std::vector<float> x(first.begin() + t * kWidth, first.begin() + (t + n) * kWidth);
    x.insert(x.end(), second.begin() + t * kWidth, second.begin() + (t + n) * kWidth);
    if (n == 1) {
      stream.step(x.data(), y.data());
    } else {
      stream.prefill(x.data(), n, y.data());
    }
    t += n;
    const std::vector<float> rest(second.begin() + start * kWidth, second.end());
    const bool right = close(y.data(), run(model, {1, t, kWidth}, first)) &&
                       close(y.data() + hidden, run(model, {1, t - start, kWidth}, rest));
    expect(right, "stream behind frame " + std::to_string(t));
  }
  expect(stream.length(0) == 150 && stream.length(1) == 48, "lengths");
  expect_error("do not fit: the longest row holds 150 of max_len=300",
               [&] { stream.prefill(first.data(), 151, y.data()); });
  expect_error("there is no row 2", [&] { stream.reset(2); });
  expect_error("must be positive", [&] { Stream(model, 0, 5); });
  expect_error("cannot be", [&] { Stream(model, 1, std::int64_t{1} << 50); });
  // With a full cache, attention to all frames but the first: another function, but finite.
  Stream slides(model, 1, 8, Stream::OnFull::kSlide);
  slides.prefill(first.data(), 20, y.data());
  expect(slides.length(0) == 20 && std::isfinite(y[0]), "sliding");
}

// A window of `length` frames is a full run on them, to the bit, also behind missed frames.
void check_window(mega_tvm::Model& model, std::int64_t batch, std::int64_t length) {
  mega_tvm::Window window(model, batch, length);
  const std::int64_t total = 3 * length + 9;
  const std::vector<float> x = random(static_cast<std::size_t>(batch * total * kWidth), 5);
  const auto frames = [&](std::int64_t first, std::int64_t n) {
    std::vector<float> piece;  // [batch, n, kWidth]
    for (std::int64_t row = 0; row < batch; ++row) {
      const auto start = x.begin() + (row * total + first) * kWidth;
      piece.insert(piece.end(), start, start + n * kWidth);
    }
    return piece;
  };
  std::vector<float> y(window.output_size());
  for (std::int64_t t = 0; t < total; ++t) {
    if (t == length + 5) {
      window.fill(frames(t, 2).data(), 2);
      t += 2;
    }
    window.push(frames(t, 1).data(), y.data());
    const std::int64_t n = std::min(t + 1, length);
    const std::vector<float> held = frames(t + 1 - n, n);
    const std::string where = std::to_string(batch) + " x " + std::to_string(t);
    expect(window.length() == n && window.frames() == held, "frames of window " + where);
    expect(run(model, {batch, n, kWidth}, held) == y, "window " + where);
  }
  window.reset();
  expect(window.length() == 0, "a window that is reset");
}

// What comes between snapshot and restore leaves no trace; beams go on from each other's states.
void check_snapshots(mega_tvm::Model& model) {
  using mega_tvm::Stream;
  Stream stream(model, 2, 100), other(model, 2, 100);
  const std::vector<float> x = random(2 * 30 * kWidth, 6), frame = random(2 * kWidth, 7);
  const std::size_t hidden = stream.output_size() / 2;
  std::vector<float> y(stream.output_size()), again(y.size()), beams(y.size());
  stream.prefill(x.data(), 30, y.data());
  stream.reset(1);
  stream.step(frame.data(), y.data());  // rows of 31 and 1 frames
  const Stream::Snapshot kept = stream.snapshot();
  stream.step(frame.data(), y.data());
  stream.prefill(x.data(), 20, again.data());
  for (Stream* restored : {&stream, &other}) {
    restored->restore(kept);
    expect(restored->length(0) == 31 && restored->length(1) == 1, "restored lengths");
    restored->step(frame.data(), again.data());
    expect(again == y, "a restored stream");
  }
  stream.restore(kept);
  stream.reorder({1, 0});
  std::vector<float> swapped(frame.begin() + kWidth, frame.end());
  swapped.insert(swapped.end(), frame.begin(), frame.begin() + kWidth);
  stream.step(swapped.data(), beams.data());
  expect(stream.length(0) == 2 && stream.length(1) == 32, "reordered lengths");
  expect(std::equal(y.begin(), y.begin() + hidden, beams.begin() + hidden) &&
             std::equal(y.begin() + hidden, y.end(), beams.begin()),
         "reordered rows");
  stream.reorder({1, 1});
  expect(stream.length(0) == 32 && stream.length(1) == 32, "a row that stands twice");
  expect_error("expected 2 rows, found 1", [&] { stream.reorder({0}); });
  expect_error("there is no row 2", [&] { stream.reorder({0, 2}); });
  Stream longer(model, 2, 101);
  expect_error("the same model, batch, max_len", [&] { longer.restore(kept); });
}

// Neither a step nor a call of a compiled shape allocates, in whichever library.
void check_allocations(mega_tvm::Model& model) {
  mega_tvm::Stream stream(model, 2, 300);
  const std::vector<float> x = random(59 * kWidth, 4);
  std::vector<float> y(stream.output_size());
  const mega_tvm::Shape shape{1, 59, kWidth};
  mega_tvm::Window window(model, 1, 59);
  window.fill(x.data(), 59);
  long before = allocations;
  for (int i = 0; i < 100; ++i) {
    if (i == 50) before = allocations;
    stream.step(x.data(), y.data());
    model.run(shape, x.data(), y.data());
    window.push(x.data(), y.data());
    if (i % 10 == 0) stream.reset(1);
  }
  const long found = allocations - before;
  expect(found == 0, std::to_string(found) + " allocations in 50 steps and calls");
  mega_tvm::Shape copy = shape;
  expect(allocations > before, "counting of allocations");
}

}  // namespace

int main(int, char** argv) {
  for (int threads : {1, 2}) {
    mega_tvm::Model model(argv[1], threads);
    check_threads(model);
    check_stream(model);
    check_snapshots(model);
    check_window(model, 1, 59);
    check_window(model, 3, 7);
    check_window(model, 2, 1);
    check_allocations(model);
    expect_error("found [2, 7, 14]; reshape it", [&] { model.entry_at({2, 7, 14}); });
    expect_error("[batch, seq_len, 13], batch 1 to 256", [&] { model.entry_at({257, 7, 13}); });
    expect(model.entry_at({1, 59, 13}).symbolic == false, "specialised");
    expect(model.entry_at({1, 58, 13}).symbolic, "symbolic");
  }
  mega_tvm::Model one(argv[1], 1), two(argv[1], 2);
  const std::vector<float> x = random(59 * kWidth, 3);
  for (int i = 0; i < 3; ++i) {
    expect(run(one, {1, 59, 13}, x) == run(two, {1, 59, 13}, x), "one and two threads alternate");
  }
  expect_error("num_threads must be positive", [&] { mega_tvm::Model(argv[1], 0); });
  std::puts("done");
}
