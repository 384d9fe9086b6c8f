// run_model MODEL.so [X.f32 Y.f32]: loads a compiled model and runs its first entry.
//
// X holds the input as raw float32; without it the input is a ramp. Y takes the output.

#include <mega_tvm.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <vector>

namespace {

void read_floats(const char* path, std::vector<float>& values) {
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(values.size() * sizeof(float));
  if (!file.read(reinterpret_cast<char*>(values.data()), bytes) || file.peek() != EOF) {
    throw mega_tvm::Error(std::string(path) + ": expected " + std::to_string(values.size()) +
                          " float32 values");
  }
}

void write_floats(const char* path, const std::vector<float>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (!file.flush()) throw mega_tvm::Error(std::string(path) + ": cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 4) {
    std::fprintf(stderr, "usage: %s MODEL.so [X.f32 Y.f32]\n", argv[0]);
    return 2;
  }
  try {
    mega_tvm::Model model(argv[1]);
    const mega_tvm::Entry& entry = model.entries().at(0);
    std::vector<float> x(entry.input_size()), y(entry.output_size());
    if (argc == 4) {
      read_floats(argv[2], x);
    } else {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3.0f;
    }
    model.run(entry, x.data(), y.data());
    const int calls = 200;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) model.run(entry, x.data(), y.data());
    const std::chrono::duration<double, std::micro> taken =
        std::chrono::steady_clock::now() - start;
    if (argc == 4) write_floats(argv[3], y);
    std::printf("%s: %zu -> %zu floats, %.1f us a call (mean of %d), y[0] = %.6f\n",
                entry.name.c_str(), x.size(), y.size(), taken.count() / calls, calls, y[0]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
