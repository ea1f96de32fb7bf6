// dx = Q(g) *^T w: lanes are input channels, tables come from the codes of four output channels.
//
// With S+ the sum of the codes q that meet a weight of +1, sum q w = 2 S+ - sum q, and with the
// zero point dx = weight (step sum q w + lo sum w).

namespace fqt::FQT_ISA {

class InputGrad final : public Product {
 public:
  explicit InputGrad(const InputGradArgs& args)
      : args_(args),
        geometry_(args.geometry),
        groups_(ceil_div(geometry_.o, 4)),
        planes_(code_planes(args.rounding.bits)),
        panels_(make_panels(geometry_.c, geometry_.taps() * groups_, kMaxVectors<CodeTables>)),
        columns_(position_classes(geometry_.x, geometry_.x.in, input_meeting)),
        index_(panel_bytes(panels_, geometry_.taps() * groups_)),
        sign_sums_(geometry_.taps() * geometry_.c) {
    const int64_t row_bytes = planes_ * geometry_.x.out * groups_ * CodeTables::kStepBytes;
    const int64_t rows = std::max<int64_t>(1, kTableBytes / std::max<int64_t>(1, row_bytes));
    const int64_t samples = std::max<int64_t>(1, rows / std::max<int64_t>(1, geometry_.y.out));
    std::vector<bool> is_kept(static_cast<size_t>(geometry_.n), false);
    for (int64_t slot = 0; slot < args.samples.count; ++slot) {
      if (args.samples.weight(slot) == 0.0f) continue;
      slots_.push_back(slot);
      is_kept[static_cast<size_t>(args.samples.index(slot))] = true;
    }
    for (int64_t n = 0; n < geometry_.n; ++n) {
      if (!is_kept[static_cast<size_t>(n)] && args.scatters) dropped_.push_back(n);
    }
    if (!args.scatters) {
      for (int64_t slot = 0; slot < args.samples.count; ++slot) {
        if (args.samples.weight(slot) == 0.0f) dropped_.push_back(slot);
      }
    }
    // Rounding is repeated for the rows that two blocks share, and for each block of panels.
    cut_ = make_cut(static_cast<int64_t>(slots_.size()), samples, geometry_.y.in,
                    std::max<int64_t>(4, (rows - geometry_.y.window) * geometry_.y.stride),
                    static_cast<int64_t>(panels_.size()), false, args.threads);
    for (const Panel& panel : panels_) pack_panel(panel);
  }

  // Each dropped sample is a task of its own: its row becomes zero.
  int64_t tasks() const override {
    return cut_.tasks() + static_cast<int64_t>(dropped_.size());
  }

  void run(int64_t task) override {
    if (task >= cut_.tasks()) return clear(dropped_[static_cast<size_t>(task - cut_.tasks())]);
    const int64_t panel = task % cut_.panel_blocks * cut_.panels;
    const int64_t rest = task / cut_.panel_blocks;
    const int64_t row = rest % cut_.row_blocks * cut_.rows;
    const int64_t slot = rest / cut_.row_blocks * cut_.samples;
    run_block({slot, std::min(static_cast<int64_t>(slots_.size()), slot + cut_.samples), row,
               std::min(geometry_.y.in, row + cut_.rows), panel,
               std::min<int64_t>(static_cast<int64_t>(panels_.size()), panel + cut_.panels)});
  }

 private:
  static constexpr int64_t kTableBytes = 262144;  // tables of a task: half of a second-level cache

  struct Block {
    int64_t first_slot, last_slot, first_row, last_row, first_panel, last_panel;
  };

  // The tables of a block, one image for each plane of the codes, and for each position the sum of
  // its codes.
  struct Tables {
    Image image[2];
    Buffer<uint8_t> data;
    Buffer<int32_t> code_sums;
  };

  void pack_panel(const Panel& panel) {
    const int64_t c = geometry_.c, o = geometry_.o;
    const Buffer<uint32_t> words(panel.width);
    for (int64_t tap = 0; tap < geometry_.taps(); ++tap) {
      int32_t* sums = sign_sums_.data() + tap * c;
      for (int64_t i = panel.channel; i < std::min(c, panel.channel + panel.width); ++i) {
        sums[i] = static_cast<int32_t>(-o);
      }
      for (int64_t first = 0; first < o; first += 32) {
        const int64_t here = std::min<int64_t>(32, o - first);
        std::fill_n(words.data(), panel.width, 0u);
        for (int64_t i = 0; i < std::min(panel.width, c - panel.channel); ++i) {
          const int64_t channel = panel.channel + i;
          const auto bits = static_cast<uint32_t>(
              extract_bits(args_.w.words, (tap * c + channel) * o + first, here));
          sums[channel] += 2 * __builtin_popcount(bits);
          words[i / kLanes * kLanes + byte_of_channel(i % kLanes, kLanes)] = bits;
        }
        uint8_t* out = index_.data() + panel.offset + (tap * groups_ + first / 4) * panel.width;
        for (int64_t i = 0; i < ceil_div(here, 4); ++i, out += panel.width) {
          for (int64_t byte = 0; byte < panel.width; ++byte) {
            out[byte] = static_cast<uint8_t>(words[byte] >> (4 * i) & 15);
          }
        }
      }
    }
  }

  void clear(int64_t n) const {
    const int64_t size = geometry_.y.in * geometry_.x.in * geometry_.c;
    std::fill_n(args_.dx + n * size, size, 0.0f);
  }

  // Rounds the output rows [first, last) of a block of samples.
  Tables make_image(const Block& block, int64_t first, int64_t last) const {
    const int64_t o = geometry_.o, width = geometry_.x.out;
    const int64_t slots = block.last_slot - block.first_slot;
    const int64_t positions = slots * (last - first) * width;
    const int64_t position_bytes = groups_ * CodeTables::kStepBytes;
    Tables tables{{}, Buffer<uint8_t>(planes_ * positions * position_bytes),
                  Buffer<int32_t>(positions)};
    for (int plane = 0; plane < planes_; ++plane) {
      tables.image[plane] = {tables.data.data() + plane * positions * position_bytes,
                             (last - first) * width * position_bytes, width * position_bytes,
                             position_bytes, first};
    }
    const Buffer<uint8_t> codes(4 * groups_);
    const Buffer<uint32_t> words(groups_), nibbles(groups_);
    std::fill_n(codes.data(), 4 * groups_, uint8_t{0});
    int64_t position = 0;
    for (int64_t i = block.first_slot; i < block.last_slot; ++i) {
      const int64_t slot = slots_[static_cast<size_t>(i)];
      const float lo = args_.rounding.lo[slot];
      const float scale = largest_fixed_point(args_.rounding.bits) / args_.rounding.range[slot];
      int64_t entry = (args_.samples.index(slot) * geometry_.y.out + first) * width * o;
      for (int64_t x = 0; x < (last - first) * width; ++x, ++position, entry += o) {
        round_group(args_.g + entry, o, lo, scale, args_.rounding, static_cast<uint32_t>(entry),
                    codes.data());
        int32_t sum = 0;
        for (int64_t k = 0; k < o; ++k) sum += codes[k];
        tables.code_sums[position] = sum;
        std::memcpy(words.data(), codes.data(), static_cast<size_t>(4 * groups_));
        for (int plane = 0; plane < planes_; ++plane) {
          take_plane(words.data(), groups_, plane, nibbles.data());
          make_tables(nibbles.data(), groups_,
                      tables.data.data() + (plane * positions + position) * position_bytes,
                      CodeTables::kStepBytes);
        }
      }
    }
    return tables;
  }

  void run_block(const Block& block) const {
    int64_t first = geometry_.y.out, last = 0;
    for (int64_t y = block.first_row; y < block.last_row; ++y) {
      const Meeting row = input_meeting(geometry_.y, y);
      if (row.count == 0) continue;
      first = std::min(first, row.source - (row.count - 1));
      last = std::max(last, row.source + 1);
    }
    const Tables tables = make_image(block, first, std::max(first, last));
    const int64_t slots = block.last_slot - block.first_slot;
    const Buffer<const uint8_t*> rows(slots * geometry_.x.in);
    const Buffer<int32_t> code_sums(slots * geometry_.x.in);
    const Buffer<int32_t> sums(slots * geometry_.x.in * kMaxVectors<CodeTables> * kLanes);
    const Buffer<float> sign_sums(kMaxVectors<CodeTables> * kLanes);
    for (int64_t y = block.first_row; y < block.last_row; ++y) {
      const Meeting row = input_meeting(geometry_.y, y);
      for (const PositionClass& columns : columns_) {
        add_code_sums(row, columns, slots, tables, first, last, code_sums.data());
        for (int64_t p = block.first_panel; p < block.last_panel; ++p) {
          const Panel& panel = panels_[static_cast<size_t>(p)];
          const int64_t n_rows = slots * static_cast<int64_t>(columns.positions.size());
          bool is_first = true;
          for (int plane = 0; plane < planes_; ++plane) {
            const Image& image = tables.image[plane];
            const bool empty = row.count * columns.count == 0;
            int64_t i = 0;
            for (int64_t source : columns.sources) {
              const uint8_t* position =
                  image.data + (empty ? 0 : (row.source - first) * image.row_bytes) +
                  source * image.position_bytes;
              for (int64_t n = 0; n < slots; ++n) rows[i++] = position + n * image.sample_bytes;
            }
            for (const std::vector<Run>& runs :
                 make_blocks<CodeTables>(row, columns, geometry_.x.window, groups_, image,
                                         panel.width)) {
              sum_rows<CodeTables>(panel.width, rows.data(), n_rows, runs.data(),
                                   static_cast<int64_t>(runs.size()),
                                   index_.data() + panel.offset, sums.data(), 4 * plane, is_first);
              is_first = false;
            }
          }
          if (is_first) std::fill_n(sums.data(), n_rows * panel.width, 0);
          add_sign_sums(row, columns, panel, sign_sums.data());
          write(block, y, columns, panel, sums.data(), code_sums.data(), sign_sums.data());
        }
      }
    }
  }

  // For each position of a class, the sum of all codes that it meets.
  void add_code_sums(const Meeting& row, const PositionClass& columns, int64_t slots,
                     const Tables& tables, int64_t first, int64_t last, int32_t* out) const {
    const int64_t width = geometry_.x.out;
    for (int64_t source : columns.sources) {
      for (int64_t n = 0; n < slots; ++n, ++out) {
        *out = 0;
        for (int64_t i = 0; i < row.count; ++i) {
          const int64_t y = n * (last - first) + row.source - i - first;
          for (int64_t j = 0; j < columns.count; ++j) {
            *out += tables.code_sums[y * width + source - j];
          }
        }
      }
    }
  }

  // For each channel of a panel, the sum of the weights' signs over the taps of a class.
  void add_sign_sums(const Meeting& row, const PositionClass& columns, const Panel& panel,
                     float* out) const {
    const int64_t count = std::min(panel.width, geometry_.c - panel.channel);
    for (int64_t k = 0; k < count; ++k) {
      int32_t sum = 0;
      for (int64_t i = 0; i < row.count; ++i) {
        for (int64_t j = 0; j < columns.count; ++j) {
          const int64_t tap = (row.tap + i * row.tap_step) * geometry_.x.window + columns.tap +
                              j * columns.tap_step;
          sum += sign_sums_[tap * geometry_.c + panel.channel + k];
        }
      }
      out[k] = static_cast<float>(sum);
    }
  }

  void write(const Block& block, int64_t y, const PositionClass& columns, const Panel& panel,
             const int32_t* sums, const int32_t* code_sums, const float* sign_sums) const {
    const int64_t count = std::min(panel.width, geometry_.c - panel.channel);
    for (int64_t x : columns.positions) {
      for (int64_t i = block.first_slot; i < block.last_slot; ++i, ++code_sums) {
        const int64_t slot = slots_[static_cast<size_t>(i)];
        const float weight = args_.samples.weight(slot);
        const Dequantize dequantize(args_.rounding.range[slot], args_.rounding.lo[slot],
                                    args_.rounding.bits);
        const int64_t n = args_.samples.index(slot);
        const int64_t position = y * geometry_.x.in + x;
        float* __restrict dx =
            args_.dx + panel.channel +
            ((args_.scatters ? n : slot) * geometry_.y.in * geometry_.x.in + position) *
                geometry_.c;
        const int32_t* __restrict row = sums;
        const auto codes = static_cast<uint32_t>(*code_sums);
        const auto sum = [=](int64_t k) {
          return static_cast<float>(
              static_cast<int32_t>(2u * static_cast<uint32_t>(row[k]) - codes));
        };
        dequantize.run(count, sum, sign_sums, weight, dx);
        if (args_.mask.words != nullptr) {
          apply_mask(n, position * geometry_.c + panel.channel, count, dx);
        }
        sums += panel.width;
      }
    }
  }

  // Clears the entries of a row whose bits, from `first` on, are clear.
  void apply_mask(int64_t n, int64_t first, int64_t count, float* __restrict dx) const {
    const uint32_t* words = args_.mask.words + n * args_.mask.row_words;
    for (int64_t i = 0; i < count; i += 32) {
      const int64_t here = std::min<int64_t>(32, count - i);
      const auto bits = static_cast<uint32_t>(extract_bits(words, first + i, here));
      for (int64_t k = 0; k < here; ++k) dx[i + k] = bits >> k & 1 ? dx[i + k] : 0.0f;
    }
  }

  const InputGradArgs args_;
  const Geometry geometry_;
  const int64_t groups_;
  const int planes_;
  const std::vector<Panel> panels_;
  const std::vector<PositionClass> columns_;
  const Buffer<uint8_t> index_;
  const Buffer<int32_t> sign_sums_;  // [taps, c]: sum of the signs over the output channels
  std::vector<int64_t> slots_;    // of samples kept with a weight other than zero
  std::vector<int64_t> dropped_;  // rows of dx that belong to no such sample
  Cut cut_;
};

}  // namespace fqt::FQT_ISA
