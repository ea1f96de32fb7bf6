// dw = x * Q(g): lanes are input channels, tables come from the codes of one output channel in four
// samples, and the contraction runs over positions and samples. A window's shift only changes the
// position, and taps outside the image are skipped, so borders stay exact.
//
// With S+ the sum of the codes q that meet a sign of +1, sum x q = 2 S+ - sum q, and with the zero
// point dw = weight (step sum x q + lo sum x). The sum of x comes from one more row of tables whose
// codes are all one.

namespace fqt::FQT_ISA {

class WeightGrad final : public Product {
 public:
  explicit WeightGrad(const WeightGradArgs& args)
      : args_(args),
        geometry_(args.geometry),
        planes_(code_planes(args.rounding.bits)),
        panels_(make_panels(geometry_.c, 1, kMaxVectors<CodeTables>)),
        lanes_(padded_channels(panels_)) {
    for (int64_t slot = 0; slot < args.samples.count; ++slot) {
      if (args.samples.weight(slot) != 0.0f) samples_.push_back(slot);
    }
    for (int64_t slot = 0; slot < args.channels.count; ++slot) {
      if (args.channels.weight(slot) != 0.0f) channels_.push_back(slot);
    }
    // So many samples at a time that a row of positions stays in the caches.
    block_samples_ = std::min<int64_t>(n_samples(), 128);
    const int64_t quads = std::max<int64_t>(1, ceil_div(block_samples_, 4));
    const int64_t row_bytes = planes_ * geometry_.x.out * quads * CodeTables::kStepBytes;
    const int64_t wanted = args.threads > 1 ? 3 * args.threads : 1;
    chunk_channels_ = std::min<int64_t>(std::max<int64_t>(1, n_channels()), 64);
    while (chunk_channels_ > 16 && chunk_channels_ * row_bytes > kTableBytes) {
      chunk_channels_ = ceil_div(chunk_channels_, 2);
    }
    block_rows_ =
        std::clamp<int64_t>(kTableBytes / (row_bytes * chunk_channels_), 1, geometry_.y.out);
    blocks_ = ceil_div(n_samples(), std::max<int64_t>(1, block_samples_)) *
              ceil_div(geometry_.y.out, block_rows_);
    // Chunks of channels are independent; where they are too few for the threads, the blocks of
    // samples and rows are split as well, and the integer sums of the splits are added.
    while (chunk_channels_ > 16 && ceil_div(n_channels(), chunk_channels_) * blocks_ < wanted) {
      chunk_channels_ = ceil_div(chunk_channels_, 2);
    }
    chunks_ = std::max<int64_t>(1, ceil_div(n_channels(), chunk_channels_));
    splits_ = std::clamp<int64_t>(ceil_div(wanted, chunks_), 1, std::max<int64_t>(1, blocks_));
    const int64_t sums = splits_ * chunks_ * chunk_sums();
    sums_ = Buffer<int32_t>(splits_ > 1 ? sums : 0);
    code_sums_ = Buffer<int32_t>(splits_ > 1 ? splits_ * chunks_ * chunk_code_sums() : 0);
    remaining_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(chunks_));
    for (auto& count : remaining_) count = splits_;
  }

  int64_t tasks() const override {
    return geometry_.c * geometry_.o == 0 ? 0 : chunks_ * splits_;
  }

  void run(int64_t task) override {
    const int64_t chunk = task / splits_, split = task % splits_;
    if (splits_ == 1) {
      const Buffer<int32_t> sums(chunk_sums()), code_sums(chunk_code_sums());
      sum_split(chunk, split, sums.data(), code_sums.data());
      return write(chunk, sums.data(), code_sums.data());
    }
    sum_split(chunk, split, sums_.data() + task * chunk_sums(),
              code_sums_.data() + task * chunk_code_sums());
    // Whoever ends a chunk's last split adds them up and writes.
    if (remaining_[static_cast<size_t>(chunk)].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      int32_t* sums = sums_.data() + chunk * splits_ * chunk_sums();
      int32_t* code_sums = code_sums_.data() + chunk * splits_ * chunk_code_sums();
      add_splits(sums, chunk_sums());
      add_splits(code_sums, chunk_code_sums());
      write(chunk, sums, code_sums);
    }
  }

 private:
  static constexpr int64_t kTableBytes = 262144;  // tables of a block: half of a second-level cache
  static constexpr int64_t kRowsAtOnce = 4;       // whose tables stay in the first-level cache

  int64_t n_samples() const { return static_cast<int64_t>(samples_.size()); }
  int64_t n_channels() const { return static_cast<int64_t>(channels_.size()); }
  // The row of ones comes after a chunk's channels.
  int64_t chunk_sums() const { return (chunk_channels_ + 1) * geometry_.taps() * lanes_; }
  int64_t chunk_code_sums() const { return geometry_.taps() * chunk_channels_; }

  void add_splits(int32_t* sums, int64_t size) const {
    for (int64_t split = 1; split < splits_; ++split) {
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[split * size + i];
    }
  }

  // Samples and output rows that are rounded and summed at a time, and their tables: steps of a
  // channel are [rows, columns, quads of samples], and `stride` bytes lead to the next channel.
  struct Block {
    int64_t first_sample, last_sample, first_row, last_row;
    int64_t quads, plane_bytes, stride;
  };

  Block block_at(int64_t i) const {
    const int64_t row_blocks = ceil_div(geometry_.y.out, block_rows_);
    Block b{};
    b.first_sample = i / row_blocks * block_samples_;
    b.last_sample = std::min(n_samples(), b.first_sample + block_samples_);
    b.first_row = i % row_blocks * block_rows_;
    b.last_row = std::min(geometry_.y.out, b.first_row + block_rows_);
    b.quads = ceil_div(b.last_sample - b.first_sample, 4);
    const int64_t steps = (b.last_row - b.first_row) * geometry_.x.out * b.quads;
    // A cache line more than a power of two keeps the rows of a tile in different cache sets.
    b.stride = ceil_div(steps * CodeTables::kStepBytes, 64) * 64 + 64;
    b.plane_bytes = b.stride * (chunk_channels_ + 1);
    return b;
  }

  void sum_split(int64_t chunk, int64_t split, int32_t* sums, int32_t* code_sums) const {
    std::fill_n(code_sums, chunk_code_sums(), 0);
    std::fill_n(sums, chunk_sums(), 0);
    if (blocks_ == 0) return;
    const Block largest = block_at(0);
    const Buffer<uint8_t> tables(planes_ * largest.plane_bytes);
    const int64_t input_rows =
        std::min(geometry_.y.in, (block_rows_ - 1) * geometry_.y.stride + geometry_.y.window);
    const Buffer<uint8_t> index(input_rows * geometry_.x.in * largest.quads * lanes_);
    const Scales scales = fold_weights(chunk);
    for (int64_t i = split * blocks_ / splits_; i < (split + 1) * blocks_ / splits_; ++i) {
      const Block block = block_at(i);
      round_block(chunk, block, scales, tables.data(), code_sums);
      const int64_t first = std::max<int64_t>(
          0, block.first_row * geometry_.y.stride - geometry_.y.before);
      const int64_t end = (block.last_row - 1) * geometry_.y.stride - geometry_.y.before +
                          geometry_.y.window;
      const int64_t last = std::max(first, std::min(geometry_.y.in, end));
      pack_input(block, first, last, index.data());
      for (int plane = 0; plane < planes_; ++plane) {
        sum_block(chunk, block, plane, first, last, tables.data(), index.data(), sums);
      }
    }
  }

  // Each (sample, channel): lo / weight, by way of the inverse as in fqt_jax/kernels/xla.py, and
  // scale * weight. They fold the samples' weights into (g * weight - lo) * scale.
  struct Scales {
    Buffer<float> lo, scale;
    Buffer<uint32_t> offsets;  // of each channel from the first of its position
  };

  int64_t chunk_size(int64_t chunk) const {
    return std::min(chunk_channels_, n_channels() - chunk * chunk_channels_);
  }

  Scales fold_weights(int64_t chunk) const {
    const int64_t size = chunk_size(chunk);
    Scales scales{Buffer<float>(n_samples() * size), Buffer<float>(n_samples() * size),
                  Buffer<uint32_t>(size)};
    for (int64_t k = 0; k < size; ++k) {
      const int64_t slot = channels_[static_cast<size_t>(chunk * chunk_channels_ + k)];
      scales.offsets[k] = static_cast<uint32_t>(args_.channels.index(slot));
      const float lo = args_.rounding.lo[slot];
      const float scale = largest_fixed_point(args_.rounding.bits) / args_.rounding.range[slot];
      for (int64_t i = 0; i < n_samples(); ++i) {
        const float weight = args_.samples.weight(samples_[static_cast<size_t>(i)]);
        scales.lo[i * size + k] = lo * (1.0f / weight);
        scales.scale[i * size + k] = scale * weight;
      }
    }
    return scales;
  }

  // Tables of a block, and the codes' sums over the positions that each tap meets.
  void round_block(int64_t chunk, const Block& block, const Scales& scales, uint8_t* tables,
                   int32_t* code_sums) const {
    const int64_t size = chunk_size(chunk), o = geometry_.o;
    const bool is_gathered = args_.channels.indices != nullptr;
    const int64_t width = geometry_.x.out;
    const Buffer<float> gathered(size);
    const Buffer<uint32_t> words(width * size), nibbles(size);
    const Buffer<int32_t> position_sums(width * size);
    for (int64_t y = block.first_row; y < block.last_row; ++y) {
      std::fill_n(position_sums.data(), width * size, 0);
      for (int64_t q = 0; q < block.quads; ++q) {
        // A sample that is not there has the code 0, in the row of ones too.
        std::fill_n(words.data(), width * size, 0u);
        uint32_t ones = 0;
        const int64_t first = block.first_sample + 4 * q;
        for (int64_t sample = first; sample < std::min(first + 4, block.last_sample); ++sample) {
          const int shift = static_cast<int>(8 * (sample - first));
          ones |= 1u << shift;
          const int64_t n = args_.samples.index(samples_[static_cast<size_t>(sample)]);
          int64_t entry = (n * geometry_.y.out + y) * width * o;
          for (int64_t x = 0; x < width; ++x, entry += o) {
            const float* g = args_.g + entry + chunk * chunk_channels_;
            if (is_gathered) {
              for (int64_t k = 0; k < size; ++k) gathered[k] = args_.g[entry + scales.offsets[k]];
              g = gathered.data();
            }
            round_groups(g, size, scales.lo.data() + sample * size,
                         scales.scale.data() + sample * size, args_.rounding,
                         static_cast<uint32_t>(entry), scales.offsets.data(), shift,
                         words.data() + x * size, position_sums.data() + x * size);
          }
        }
        for (int64_t x = 0; x < width; ++x) {
          const int64_t step = ((y - block.first_row) * width + x) * block.quads + q;
          uint8_t* out = tables + step * CodeTables::kStepBytes;
          make_tables(&ones, 1, out + size * block.stride, block.stride);
          for (int plane = 0; plane < planes_; ++plane, out += block.plane_bytes) {
            take_plane(words.data() + x * size, size, plane, nibbles.data());
            make_tables(nibbles.data(), size, out, block.stride);
          }
        }
      }
      for (int64_t x = 0; x < width; ++x) {
        add_code_sums(y, x, size, position_sums.data() + x * size, code_sums);
      }
    }
  }

  void add_code_sums(int64_t y, int64_t x, int64_t size, const int32_t* position_sums,
                     int32_t* code_sums) const {
    const Meeting rows = output_meeting(geometry_.y, y), columns = output_meeting(geometry_.x, x);
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t j = 0; j < columns.count; ++j) {
        const int64_t tap = (rows.tap + i) * geometry_.x.window + columns.tap + j;
        for (int64_t k = 0; k < size; ++k) {
          code_sums[tap * chunk_channels_ + k] += position_sums[k];
        }
      }
    }
  }

  // Index bytes of the input rows [first, last), panel after panel: [rows, columns, quads, width].
  void pack_input(const Block& block, int64_t first, int64_t last, uint8_t* index) const {
    const int64_t c = geometry_.c;
    for (const Panel& panel : panels_) {
      const int64_t count = std::min(panel.width, c - panel.channel);
      for (int64_t position = first * geometry_.x.in; position < last * geometry_.x.in;
           ++position) {
        for (int64_t q = 0; q < block.quads; ++q, index += panel.width) {
          BitRow rows[4];
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t sample = block.first_sample + 4 * q + i;
            rows[i] = {nullptr, position * c + panel.channel};
            if (sample >= block.last_sample) continue;
            const int64_t n = args_.samples.index(samples_[static_cast<size_t>(sample)]);
            rows[i].words = args_.x.words + n * args_.x.row_words;
          }
          pack_rows(rows, count, panel.width, false, index);
        }
      }
    }
  }

  // The sums of a chunk: for each panel and tap the channels' rows and then the row of ones, each
  // as wide as the panel.
  int64_t sums_at(const Panel& panel, int64_t tap) const {
    return (chunk_channels_ + 1) * (panel.channel * geometry_.taps() + tap * panel.width);
  }

  void sum_block(int64_t chunk, const Block& block, int plane, int64_t first, int64_t last,
                 const uint8_t* tables, const uint8_t* index, int32_t* sums) const {
    // The row of ones has tables in the first plane only.
    const int64_t size = chunk_size(chunk), n_rows = size + (plane == 0 ? 1 : 0);
    const Buffer<const uint8_t*> rows(size + 1);
    for (int64_t k = 0; k <= size; ++k) {
      rows[k] = tables + plane * block.plane_bytes + k * block.stride;
    }
    const int64_t window = geometry_.x.window, positions = (last - first) * geometry_.x.in;
    std::vector<std::vector<Run>> runs(static_cast<size_t>(window));
    for (const Panel& panel : panels_) {
      const uint8_t* panel_index = index + panel.channel * positions * block.quads;
      // Segments of the output positions whose index bytes stay in the first-level cache, together
      // with the tables of a few rows, while all taps across use them.
      const int64_t steps = std::min(kBlockBytes / panel.width, kMaxSteps<CodeTables>);
      const int64_t at_once = std::max<int64_t>(1, steps / block.quads);
      const int64_t segment_width = std::min(at_once, geometry_.x.out);
      const int64_t segment_rows = std::max<int64_t>(1, at_once / geometry_.x.out);
      for (int64_t y = block.first_row; y < block.last_row; y += segment_rows) {
        const Range ys{y, std::min(y + segment_rows, block.last_row)};
        for (int64_t x = 0; x < geometry_.x.out; x += segment_width) {
          const Range xs{x, std::min(x + segment_width, geometry_.x.out)};
          for (int64_t tap_y = 0; tap_y < geometry_.y.window; ++tap_y) {
            for (int64_t tap_x = 0; tap_x < window; ++tap_x) {
              find_runs(block, first, tap_y, tap_x, ys, xs, runs[static_cast<size_t>(tap_x)]);
            }
            for (int64_t k = 0; k < n_rows; k += kRowsAtOnce) {
              for (int64_t tap_x = 0; tap_x < window; ++tap_x) {
                const std::vector<Run>& these = runs[static_cast<size_t>(tap_x)];
                if (these.empty()) continue;
                sum_rows<CodeTables>(
                    panel.width, rows.data() + k, std::min(kRowsAtOnce, n_rows - k), these.data(),
                    static_cast<int64_t>(these.size()), panel_index,
                    sums + sums_at(panel, tap_y * window + tap_x) + k * panel.width, 4 * plane,
                    false);
              }
            }
          }
        }
      }
    }
  }

  // Where a tap meets the input, over the output positions of a segment.
  void find_runs(const Block& block, int64_t first, int64_t tap_y, int64_t tap_x, Range ys,
                 Range xs, std::vector<Run>& runs) const {
    runs.clear();
    const Range met_y = tap_outputs(geometry_.y, tap_y), met_x = tap_outputs(geometry_.x, tap_x);
    for (int64_t y = std::max(ys.first, met_y.first); y < std::min(ys.last, met_y.last); ++y) {
      const int64_t in_y = y * geometry_.y.stride - geometry_.y.before + tap_y - first;
      for (int64_t x = std::max(xs.first, met_x.first); x < std::min(xs.last, met_x.last); ++x) {
        const int64_t in_x = x * geometry_.x.stride - geometry_.x.before + tap_x;
        append_run(runs, {((y - block.first_row) * geometry_.x.out + x) * block.quads,
                          (in_y * geometry_.x.in + in_x) * block.quads, block.quads});
      }
    }
  }

  // The chunk owns the output channels from its first one to the next chunk's.
  Range owned_channels(int64_t chunk) const {
    auto first = [&](int64_t c) {
      if (c == 0) return int64_t{0};
      if (c == chunks_) return geometry_.o;
      return args_.channels.index(channels_[static_cast<size_t>(c * chunk_channels_)]);
    };
    return {first(chunk), first(chunk + 1)};
  }

  void write(int64_t chunk, const int32_t* sums, const int32_t* code_sums) const {
    const int64_t size = chunk_size(chunk);
    const Range owned = owned_channels(chunk);
    const bool is_whole = owned.last - owned.first == size;
    const Buffer<float> values(std::max<int64_t>(1, size) * kMaxVectors<CodeTables> * kLanes);
    const Buffer<float> rows(std::max<int64_t>(1, size) * kMaxVectors<CodeTables> * kLanes);
    const Buffer<float> sign_sums(kMaxVectors<CodeTables> * kLanes);
    const Buffer<int64_t> columns(size);  // of the kept channels among those owned
    for (int64_t k = 0; k < size; ++k) {
      const int64_t slot = channels_[static_cast<size_t>(chunk * chunk_channels_ + k)];
      columns[k] = args_.channels.index(slot) - owned.first;
    }
    for (const Panel& panel : panels_) {
      const int64_t count = std::min(panel.width, geometry_.c - panel.channel);
      for (int64_t tap = 0; tap < geometry_.taps(); ++tap) {
        const int32_t* row = sums + sums_at(panel, tap);
        const int32_t* ones = row + size * panel.width;
        const int32_t terms = tap_terms(tap);
        for (int64_t l = 0; l < count; ++l) {
          sign_sums[l] = static_cast<float>(static_cast<int32_t>(2u * static_cast<uint32_t>(ones[l]) -
                                                                 static_cast<uint32_t>(terms)));
        }
        for (int64_t k = 0; k < size; ++k, row += panel.width) {
          const int64_t slot = channels_[static_cast<size_t>(chunk * chunk_channels_ + k)];
          const float weight = args_.channels.weight(slot);
          const Dequantize dequantize(args_.rounding.range[slot], args_.rounding.lo[slot],
                                      args_.rounding.bits);
          const auto codes = static_cast<uint32_t>(code_sums[tap * chunk_channels_ + k]);
          const int32_t* __restrict in = row;
          const auto sum = [=](int64_t l) {
            return static_cast<float>(
                static_cast<int32_t>(2u * static_cast<uint32_t>(in[l]) - codes));
          };
          dequantize.run(count, sum, sign_sums.data(), weight, values.data() + k * panel.width);
        }
        float* dw = args_.dw + (tap * geometry_.c + panel.channel) * geometry_.o + owned.first;
        transpose(values.data(), panel.width, size, count, rows.data(), size);
        for (int64_t l = 0; l < count; ++l, dw += geometry_.o) {
          const float* row_values = rows.data() + l * size;
          if (is_whole) {
            std::copy_n(row_values, size, dw);
          } else {
            std::fill_n(dw, owned.last - owned.first, 0.0f);
            for (int64_t k = 0; k < size; ++k) dw[columns[k]] = row_values[k];
          }
        }
      }
    }
  }

  // How many signs meet a tap, over all positions and samples.
  int32_t tap_terms(int64_t tap) const {
    if (n_samples() == 0) return 0;  // and then the positions have no bound
    const Range ys = tap_outputs(geometry_.y, tap / geometry_.x.window);
    const Range xs = tap_outputs(geometry_.x, tap % geometry_.x.window);
    return static_cast<int32_t>((ys.last - ys.first) * (xs.last - xs.first) * n_samples());
  }

  const WeightGradArgs args_;
  const Geometry geometry_;
  const int planes_;
  const std::vector<Panel> panels_;
  const int64_t lanes_;
  std::vector<int64_t> samples_, channels_;  // slots kept with a weight other than zero
  int64_t block_samples_, block_rows_, blocks_, chunk_channels_, chunks_, splits_;
  Buffer<int32_t> sums_, code_sums_;
  std::vector<std::atomic<int64_t>> remaining_;
};

}  // namespace fqt::FQT_ISA
