// z = x * w: lanes are output channels, tables come from the signs of four input channels.

namespace fqt::FQT_ISA {

class Forward final : public Product {
 public:
  explicit Forward(const ForwardArgs& args)
      : args_(args),
        geometry_(args.geometry),
        groups_(ceil_div(geometry_.c, 4)),
        panels_(make_panels(geometry_.o, geometry_.taps() * groups_, kMaxVectors<SignTables>)),
        columns_(position_classes(geometry_.x, geometry_.x.out, output_meeting)),
        index_(panel_bytes(panels_, geometry_.taps() * groups_)) {
    // About this many positions of a row are summed while a part of a panel stays in the cache.
    constexpr int64_t kPositions = 256;
    cut_ = make_cut(geometry_.n, kPositions / std::max<int64_t>(1, geometry_.x.out), geometry_.y.out,
                    geometry_.y.out, static_cast<int64_t>(panels_.size()), true, args.threads);
    for (const Panel& panel : panels_) pack_panel(panel);
  }

  int64_t tasks() const override { return cut_.tasks(); }

  void run(int64_t task) override {
    const int64_t panel = task % cut_.panel_blocks * cut_.panels;
    const int64_t rest = task / cut_.panel_blocks;
    const int64_t row = rest % cut_.row_blocks * cut_.rows;
    const int64_t sample = rest / cut_.row_blocks * cut_.samples;
    const Block block{sample, std::min(geometry_.n, sample + cut_.samples),
                      row,    std::min(geometry_.y.out, row + cut_.rows),
                      panel,  std::min<int64_t>(panels_.size(), panel + cut_.panels)};
    if (args_.is_wide) {
      run_block<int32_t>(block);
    } else {
      run_block<uint16_t>(block);
    }
  }

 private:
  struct Block {
    int64_t first_sample, last_sample, first_row, last_row, first_panel, last_panel;
  };

  void pack_panel(const Panel& panel) {
    const int64_t count = std::min(panel.width, geometry_.o - panel.channel);
    uint8_t* out = index_.data() + panel.offset;
    for (int64_t tap = 0; tap < geometry_.taps(); ++tap) {
      for (int64_t group = 0; group < groups_; ++group, out += panel.width) {
        BitRow rows[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t c = 4 * group + i;
          rows[i] = {c < geometry_.c ? args_.w.words : nullptr,
                     (tap * geometry_.c + c) * geometry_.o + panel.channel};
        }
        // A channel that is not there is a zero in x, so a one here never agrees.
        pack_rows(rows, count, panel.width, true, out);
      }
    }
  }

  // Offsets into SignTables for the input rows [first, last) of a block of samples.
  Buffer<uint8_t> make_image(const Block& block, int64_t first, int64_t last, Image& image) const {
    const int64_t width = geometry_.x.in, c = geometry_.c;
    image.position_bytes = groups_;
    image.row_bytes = width * groups_;
    image.sample_bytes = (last - first) * image.row_bytes;
    image.first_y = first;
    Buffer<uint8_t> buffer((block.last_sample - block.first_sample) * image.sample_bytes + 8);
    image.data = buffer.data();
    uint8_t* out = buffer.data();
    for (int64_t n = block.first_sample; n < block.last_sample; ++n) {
      const uint32_t* words = args_.x.words + n * args_.x.row_words;
      for (int64_t position = first * width; position < last * width; ++position) {
        for (int64_t i = 0; i < c; i += 32) {
          const int64_t here = std::min<int64_t>(32, c - i);
          const uint64_t bytes = spread_nibbles(extract_bits(words, position * c + i, here)) << 4;
          // Whole groups of eight overlap what comes next, which is written later.
          std::memcpy(out, &bytes, sizeof bytes);
          out += ceil_div(here, 4);
        }
      }
    }
    return buffer;
  }

  template <typename Sum>
  void run_block(const Block& block) const {
    int64_t first = geometry_.y.in, last = 0;
    for (int64_t y = block.first_row; y < block.last_row; ++y) {
      const Meeting row = output_meeting(geometry_.y, y);
      if (row.count == 0) continue;
      first = std::min(first, row.source);
      last = std::max(last, row.source + row.count);
    }
    Image image{};
    const Buffer<uint8_t> buffer = make_image(block, first, std::max(first, last), image);
    const int64_t samples = block.last_sample - block.first_sample;
    const Buffer<const uint8_t*> rows(samples * geometry_.x.out);
    const Buffer<Sum> sums(samples * geometry_.x.out * kMaxVectors<SignTables> * kLanes);
    for (int64_t y = block.first_row; y < block.last_row; ++y) {
      const Meeting row = output_meeting(geometry_.y, y);
      for (const PositionClass& columns : columns_) {
        const bool empty = row.count * columns.count == 0;
        int64_t n_rows = 0;
        for (int64_t source : columns.sources) {
          const uint8_t* position = image.data + (empty ? 0 : (row.source - first)) * image.row_bytes +
                                    source * image.position_bytes;
          for (int64_t n = 0; n < samples; ++n) rows[n_rows++] = position + n * image.sample_bytes;
        }
        for (int64_t p = block.first_panel; p < block.last_panel; ++p) {
          const Panel& panel = panels_[p];
          const auto blocks = make_blocks<SignTables>(row, columns, geometry_.x.window, groups_,
                                                      image, panel.width);
          if (blocks.empty()) std::fill_n(sums.data(), n_rows * panel.width, Sum{0});
          for (size_t i = 0; i < blocks.size(); ++i) {
            sum_rows<SignTables>(panel.width, rows.data(), n_rows, blocks[i].data(),
                                 static_cast<int64_t>(blocks[i].size()),
                                 index_.data() + panel.offset, sums.data(), 0, i == 0);
          }
          const int64_t terms = row.count * columns.count * geometry_.c;
          write(block, y, columns, panel, terms, sums.data());
        }
      }
    }
  }

  // z = agreements - disagreements = 2 agreements - terms.
  template <typename Sum>
  void write(const Block& block, int64_t y, const PositionClass& columns, const Panel& panel,
             int64_t terms, const Sum* sums) const {
    using Out = std::conditional_t<sizeof(Sum) == 2, int16_t, int32_t>;
    const int64_t count = std::min(panel.width, geometry_.o - panel.channel);
    const Sum offset = static_cast<Sum>(terms);
    for (int64_t x : columns.positions) {
      for (int64_t n = block.first_sample; n < block.last_sample; ++n, sums += panel.width) {
        Out* z = static_cast<Out*>(args_.z) + panel.channel +
                 ((n * geometry_.y.out + y) * geometry_.x.out + x) * geometry_.o;
        for (int64_t i = 0; i < count; ++i) {
          z[i] = static_cast<Out>(static_cast<Sum>(2 * sums[i] - offset));
        }
      }
    }
  }

  const ForwardArgs args_;
  const Geometry geometry_;
  const int64_t groups_;
  const std::vector<Panel> panels_;
  const std::vector<PositionClass> columns_;
  const Buffer<uint8_t> index_;
  Cut cut_;
};

}  // namespace fqt::FQT_ISA
