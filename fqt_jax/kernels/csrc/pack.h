// Signs of four entries as index bytes, one nibble a byte, laid out in panels.

namespace fqt::FQT_ISA {

// `count` bits from position `first` of a row of 32-bit words, at most 64; the rest are zero.
inline uint64_t extract_bits(const uint32_t* words, int64_t first, int64_t count) {
  const int64_t last = first + count - 1;
  const int shift = static_cast<int>(first % 32);
  uint64_t bits = words[first / 32] >> shift;
  if (last / 32 > first / 32) bits |= uint64_t{words[first / 32 + 1]} << (32 - shift);
  // A third word only where 64 bits straddle two boundaries, so shift is not zero.
  if (last / 32 > first / 32 + 1) bits |= uint64_t{words[first / 32 + 2]} << (64 - shift);
  return count >= 64 ? bits : bits & ((uint64_t{1} << count) - 1);
}

// Eight nibbles of a word as eight bytes.
inline uint64_t spread_nibbles(uint64_t word) {
  word = (word | word << 16) & 0x0000FFFF0000FFFF;
  word = (word | word << 8) & 0x00FF00FF00FF00FF;
  return (word | word << 4) & 0x0F0F0F0F0F0F0F0F;
}

// The channels are cut into panels of J vectors, J a power of two, so that what an inner loop reads
// is contiguous. A panel holds `steps` rows of J * kLanes bytes.
struct Panel {
  int64_t channel;  // the first
  int64_t width;    // bytes of a step, also channels; beyond the last channel they are unused
  int64_t offset;   // of its data, in bytes
};

inline std::vector<Panel> make_panels(int64_t channels, int64_t steps, int max_vectors) {
  std::vector<Panel> panels;
  int64_t offset = 0;
  for (int64_t first = 0; first < channels;) {
    const int64_t needed = (channels - first + kLanes - 1) / kLanes;
    int vectors = max_vectors;
    while (vectors > needed) vectors /= 2;
    const int64_t width = vectors * kLanes;
    panels.push_back({first, width, offset});
    offset += steps * width;
    first += width;
  }
  return panels;
}

inline int64_t panel_bytes(const std::vector<Panel>& panels, int64_t steps) {
  return panels.empty() ? 0 : panels.back().offset + steps * panels.back().width;
}

inline int64_t padded_channels(const std::vector<Panel>& panels) {
  return panels.empty() ? 0 : panels.back().channel + panels.back().width;
}

// One row of four bits: `words` is null where the row is absent, and then all its bits are `fill`.
struct BitRow {
  const uint32_t* words;
  int64_t first;
};

// Index bytes of `count` channels of a panel: channel i has bit first + i of each of four rows.
inline void pack_rows(const BitRow (&rows)[4], int64_t count, int64_t width, bool fill,
                      uint8_t* out) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - i);
    Vec index = zero();
    for (int r = 0; r < 4 && here > 0; ++r) {
      uint64_t bits = fill ? ~uint64_t{0} : 0;
      if (rows[r].words) bits = extract_bits(rows[r].words, rows[r].first + i, here);
      index = bit_or(index, expand_bits(bits, 1 << r));
    }
    store(out + i, index);
  }
}

}  // namespace fqt::FQT_ISA
