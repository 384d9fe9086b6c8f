// Reads the manifest of a compiled model's file.

#ifndef MEGA_TVM_ARTIFACT_H_
#define MEGA_TVM_ARTIFACT_H_

#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>

#include "buffer.h"

namespace mega_tvm {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Fields of the manifest. A missing one, or another type, throws tvm::ffi::Error.
namespace manifest {

namespace json = tvm::ffi::json;

// Sizes whose product is larger than any memory are damage, and would overflow.
constexpr std::int64_t kMost = std::int64_t{1} << 40;

inline json::Object object(const json::Object& from, const char* name) {
  return from.at(tvm::ffi::String(name)).cast<json::Object>();
}
inline json::Array array(const json::Object& from, const char* name) {
  return from.at(tvm::ffi::String(name)).cast<json::Array>();
}
inline std::string text(const json::Object& from, const char* name) {
  return from.at(tvm::ffi::String(name)).cast<std::string>();
}
inline std::int64_t checked(std::int64_t value, std::int64_t least, const char* name) {
  if (value < least || value > kMost) {
    throw Error(std::string(name) + " cannot be " + std::to_string(value));
  }
  return value;
}
inline std::int64_t number(const json::Object& from, const char* name, std::int64_t least = 0) {
  return checked(from.at(tvm::ffi::String(name)).cast<std::int64_t>(), least, name);
}
// Returns a product of two such values.
inline std::int64_t times(std::int64_t a, std::int64_t b, const char* name) {
  return b == 0 ? 0 : checked(a <= kMost / b ? a * b : -1, 0, name);
}
inline Shape checked(Shape shape) {
  std::int64_t product = 1;
  for (std::int64_t extent : shape) {
    product = times(product, checked(extent, 1, "a dimension"), "an array's size");
  }
  return shape;
}
inline Shape shape(const json::Array& from) {
  Shape extents;
  for (const tvm::ffi::Any& extent : from) extents.push_back(extent.cast<std::int64_t>());
  return checked(extents);
}

// The file ends in: manifest (JSON) | its sha256, 32 bytes | its length, u64 | "MEGATVM1".
inline json::Object read(std::ifstream& file, const std::string& path) {
  constexpr std::int64_t kFooter = 48;
  char footer[kFooter];
  file.seekg(0, std::ios::end);
  const std::int64_t size = file.tellg();
  if (size >= kFooter) file.seekg(size - kFooter);
  if (size < kFooter || !file.read(footer, kFooter) ||
      std::memcmp(footer + 40, "MEGATVM1", 8) != 0) {
    throw Error(path + ": not a compiled model, or cut off");
  }
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(footer[32 + i]);
  if (length > static_cast<std::uint64_t>(size - kFooter)) throw Error(path + ": is damaged");
  std::string content(length, '\0');
  const std::int64_t end = size - kFooter - static_cast<std::int64_t>(length);
  file.seekg(end);
  if (!file.read(content.data(), static_cast<std::streamsize>(length))) {
    throw Error(path + ": cannot be read");
  }
  tvm::ffi::String message;
  const json::Object found = json::Parse(content, &message).cast<json::Object>();
  if (number(found, "format_version") != 2) {
    throw Error("is of another format version; compile the model again");
  }
  const json::Object tensors = object(found, "tensors");
  if (number(tensors, "offset") + number(tensors, "bytes") != end) {
    throw Error("states other lengths than the file has");
  }
  return found;
}

inline void check_cpu(const json::Object& manifest, const std::string& path) {
  std::ifstream info("/proc/cpuinfo");
  std::string line, flags;
  while (std::getline(info, line)) {
    if (line.rfind("flags", 0) == 0) {
      flags = line.substr(line.find(':') + 1) + " ";
      break;
    }
  }
  for (const tvm::ffi::Any& item : array(object(manifest, "target"), "cpu_features")) {
    const std::string feature = item.cast<std::string>();
    if (flags.find(" " + feature + " ") == std::string::npos) {
      throw Error(path + ": this CPU lacks " + feature + "; compile the model for this machine");
    }
    // Such code needs a permission of the system's, which the Python runtime asks for.
    if (feature == "amx_tile") throw Error(path + ": AMX models run from Python only");
  }
}

}  // namespace manifest
}  // namespace mega_tvm

#endif  // MEGA_TVM_ARTIFACT_H_
