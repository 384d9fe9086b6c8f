// run_model MODEL.so [--shape B,T,N] [--threads N] [--stream] [X.f32 Y.f32]
//
// Loads a compiled model and runs it: its first entry, or another shape. With --stream, frames are
// fed one after the other, the first half at once. X holds the input as raw float32; without it the
// input is a ramp. Y takes the output.

#include <mega_tvm.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string model, x, y;
  mega_tvm::Shape shape;
  int threads = 1;
  bool stream = false;
};

bool parse(int argc, char** argv, Options& options) {
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--stream") {
      options.stream = true;
    } else if (argument == "--threads" && i + 1 < argc) {
      options.threads = std::atoi(argv[++i]);
    } else if (argument == "--shape" && i + 1 < argc) {
      std::istringstream text(argv[++i]);
      for (std::string part; std::getline(text, part, ',');) {
        options.shape.push_back(std::atoll(part.c_str()));
      }
    } else if (argument.rfind("--", 0) == 0) {
      return false;
    } else {
      files.push_back(argument);
    }
  }
  if (files.size() != 1 && files.size() != 3) return false;
  options.model = files[0];
  if (files.size() == 3) {
    options.x = files[1];
    options.y = files[2];
  }
  return true;
}

void read_floats(const std::string& path, std::vector<float>& values) {
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(values.size() * sizeof(float));
  if (!file.read(reinterpret_cast<char*>(values.data()), bytes) || file.peek() != EOF) {
    throw mega_tvm::Error(path + ": expected " + std::to_string(values.size()) +
                          " float32 values");
  }
}

void write_floats(const std::string& path, const std::vector<float>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (!file.flush()) throw mega_tvm::Error(path + ": cannot be written");
}

// Returns the mean time of a call in us.
template <typename Call>
double time(int calls, Call call) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call();
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / calls;
}

// Feeds x [B, T, N] in pieces; returns the time of a step in us.
double feed(mega_tvm::Model& model, const mega_tvm::Shape& shape, const std::vector<float>& x,
            std::vector<float>& y) {
  const std::int64_t batch = shape[0], length = shape[1], width = shape[2];
  mega_tvm::Stream stream(model, batch, length);
  const auto frames = [&](std::int64_t first, std::int64_t n) {
    std::vector<float> piece;  // [B, n, N]
    for (std::int64_t row = 0; row < batch; ++row) {
      const auto start = x.begin() + (row * length + first) * width;
      piece.insert(piece.end(), start, start + n * width);
    }
    return piece;
  };
  const std::int64_t half = length / 2;
  if (half > 0) stream.prefill(frames(0, half).data(), half, y.data());
  std::int64_t t = half;
  return time(static_cast<int>(length - half),
              [&] { stream.step(frames(t++, 1).data(), y.data()); });
}

void run(const Options& options) {
  mega_tvm::Model model(options.model, options.threads);
  const mega_tvm::Entry entry =
      options.shape.empty() ? model.entries().at(0) : model.entry_at(options.shape);
  std::vector<float> x(entry.input_size()), y(entry.output_size());
  if (!options.x.empty()) {
    read_floats(options.x, x);
  } else {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3.0f;
  }
  double us;
  if (options.stream) {
    us = feed(model, entry.input_shape, x, y);
  } else {
    model.run(entry.input_shape, x.data(), y.data());
    us = time(200, [&] { model.run(entry.input_shape, x.data(), y.data()); });
  }
  if (!options.y.empty()) write_floats(options.y, y);
  std::printf("%s: %zu -> %zu floats, %.1f us a %s, threads %d, y[0] = %.6f\n",
              options.stream ? "stream" : entry.name.c_str(), x.size(), y.size(), us,
              options.stream ? "step" : "call", model.num_threads(), y[0]);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, options)) {
    std::fprintf(stderr,
                 "usage: %s MODEL.so [--shape B,T,N] [--threads N] [--stream] [X.f32 Y.f32]\n",
                 argv[0]);
    return 2;
  }
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
