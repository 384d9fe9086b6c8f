// What shapes a compiled model runs; arrays are float32, in C order.

#ifndef MEGA_TVM_ENTRY_H_
#define MEGA_TVM_ENTRY_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "artifact.h"

namespace mega_tvm {

// One shape that a model runs.
struct Entry {
  std::string name;        // the function in the library
  Shape input_shape;       // [B, T, embed]
  Shape output_shape;      // [B, hidden]
  std::int64_t workspace;  // bytes that a call needs for intermediates
  bool symbolic = false;   // whether the function serves other shapes too

  std::size_t input_size() const { return count(input_shape); }
  std::size_t output_size() const { return count(output_shape); }

  static Entry of(const manifest::json::Object& fields) {
    return {manifest::text(fields, "name"),
            manifest::shape(manifest::array(manifest::object(fields, "input"), "shape")),
            manifest::shape(manifest::array(manifest::object(fields, "output"), "shape")),
            manifest::number(fields, "workspace", 1)};
  }
};

inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

// What a call brings, batch and length, by the manifest's names.
using Sizes = std::map<std::string, std::int64_t>;

// Bytes a row by region: "batch*seq_len", "batch" or "fixed".
class Workspace {
 public:
  static Workspace of(const manifest::json::Object& fields) {
    Workspace found;
    for (const auto& item : fields) {
      const std::string region = item.first.cast<std::string>();
      Region read{{}, manifest::checked(item.second.cast<std::int64_t>(), 0, "workspace")};
      for (std::size_t start = 0, end; start <= region.size(); start = end + 1) {
        end = region.find('*', start);
        if (end == std::string::npos) end = region.size();
        const std::string name = region.substr(start, end - start);
        if (name != "fixed") read.names.push_back(name);
      }
      found.regions_.push_back(std::move(read));
    }
    return found;
  }

  // At least one byte.
  std::int64_t bytes(const Sizes& sizes) const {
    std::int64_t sum = 1;
    for (const Region& region : regions_) {
      std::int64_t product = region.bytes;
      for (const std::string& name : region.names) {
        const auto size = sizes.find(name);
        if (size == sizes.end()) throw Error("workspace names " + name + ", which no call brings");
        product = manifest::times(product, size->second, "workspace");
      }
      sum += product;
    }
    return sum;
  }

 private:
  struct Region {
    std::vector<std::string> names;
    std::int64_t bytes;
  };
  std::vector<Region> regions_;
};

// A function that serves every batch and length within limits.
class SymbolicEntry {
 public:
  static SymbolicEntry of(const manifest::json::Object& fields) {
    SymbolicEntry found;
    found.name_ = manifest::text(fields, "name");
    const manifest::json::Object limits = manifest::object(fields, "limits");
    found.input_ = found.read(manifest::object(fields, "input"), limits);
    found.output_ = found.read(manifest::object(fields, "output"), limits);
    found.workspace_ = Workspace::of(manifest::object(fields, "workspace"));
    return found;
  }

  const std::string& name() const { return name_; }

  // The entry for an input's shape, or none if the shape does not fit.
  std::optional<Entry> at(const Shape& shape) const {
    if (shape.size() != input_.size()) return std::nullopt;
    Sizes sizes;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      const Dim& dim = input_[i];
      if (shape[i] < dim.least || shape[i] > dim.most) return std::nullopt;
      if (!dim.name.empty()) sizes[dim.name] = shape[i];
    }
    Entry entry{name_, manifest::checked(shape), {}, workspace_.bytes(sizes), true};
    for (const Dim& dim : output_) {
      const auto size = sizes.find(dim.name);
      if (!dim.name.empty() && size == sizes.end()) {
        throw Error("the output has a dimension " + dim.name + ", which the input lacks");
      }
      entry.output_shape.push_back(dim.name.empty() ? dim.least : size->second);
    }
    entry.output_shape = manifest::checked(entry.output_shape);
    return entry;
  }

  // Its input's shape and limits: "[batch, seq_len, 287], batch 1 to 256, seq_len 1 to 4096".
  std::string describe() const {
    std::string shape, limits;
    for (const Dim& dim : input_) {
      const std::string least = std::to_string(dim.least);
      shape += (shape.empty() ? "" : ", ") + (dim.name.empty() ? least : dim.name);
      if (!dim.name.empty()) {
        limits += ", " + dim.name + " " + least + " to " + std::to_string(dim.most);
      }
    }
    return "[" + shape + "]" + limits;
  }

 private:
  // `name` is empty where the size is fixed.
  struct Dim {
    std::string name;
    std::int64_t least, most;
  };

  static std::vector<Dim> read(const manifest::json::Object& side,
                               const manifest::json::Object& limits) {
    std::vector<Dim> dims;
    for (const tvm::ffi::Any& item : manifest::array(side, "shape")) {
      if (item.as<tvm::ffi::String>()) {
        const std::string name = item.cast<std::string>();
        const Shape both = manifest::shape(manifest::array(limits, name.c_str()));
        if (both.size() != 2) throw Error("limits." + name + " are not two");
        dims.push_back({name, both[0], both[1]});
      } else {
        const std::int64_t size = manifest::checked(item.cast<std::int64_t>(), 1, "a dimension");
        dims.push_back({"", size, size});
      }
    }
    return dims;
  }

  std::string name_;
  std::vector<Dim> input_, output_;
  Workspace workspace_;
};

}  // namespace mega_tvm

#endif  // MEGA_TVM_ENTRY_H_
