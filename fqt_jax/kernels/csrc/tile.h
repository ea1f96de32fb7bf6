// The inner kernel: a tile of P rows x J vectors of channels, summed by table look-up.
//
// Let an index byte hold the signs of four entries, one bit each. A table of 16 bytes, made from
// the four operands that they meet, then gives the sum of their products in one look-up, and one
// byte shuffle does kLanes of those. Sums stay in bytes as long as they cannot overflow, then
// widen to 16 bits.

namespace fqt::FQT_ISA {

// Consecutive steps of a contraction: a row's tables start `source` steps from the row's base, the
// index vectors `index` steps into the panel.
struct Run {
  int64_t source, index, count;
};

// Adds a run to a list, as part of the last one where it continues that.
inline void append_run(std::vector<Run>& runs, Run run) {
  if (!runs.empty() && runs.back().source + runs.back().count == run.source &&
      runs.back().index + runs.back().count == run.index) {
    runs.back().count += run.count;
  } else {
    runs.push_back(run);
  }
}

// For two sets of four signs, how many agree: entry 16 a + b.
struct SignTableData {
  alignas(64) uint8_t data[256];
  constexpr SignTableData() : data() {
    for (int a = 0; a < 16; ++a) {
      for (int b = 0; b < 16; ++b) {
        int agree = 0;
        for (int k = 0; k < 4; ++k) agree += (a >> k & 1) == (b >> k & 1);
        data[16 * a + b] = static_cast<uint8_t>(agree);
      }
    }
  }
};
inline constexpr SignTableData kSignTables;

// A row's byte is the offset of its table.
struct SignTables {
  static constexpr int64_t kStepBytes = 1;
  static constexpr int kLargest = 4;
  static constexpr int kDepth = 60;  // look-ups whose sum fits in a byte

  static Vec at(const uint8_t* row, int64_t step) { return load_table(kSignTables.data + row[step]); }
};

// Tables of four codes below 16, made by make_tables.
struct CodeTables {
  static constexpr int64_t kStepBytes = 16;
  static constexpr int kLargest = 60;
  static constexpr int kDepth = 4;

  static Vec at(const uint8_t* row, int64_t step) { return load_table(row + 16 * step); }
};

// The 16-bit sums hold this many look-ups.
template <typename Tables>
constexpr int64_t kMaxSteps = 65535 / Tables::kLargest;

// Sums of P rows over all runs, at most kMaxSteps steps, shifted left by `shift`, into `out`, row
// after row: stored where `is_first`, else added.
template <int P, int J, typename Tables, typename Sum>
void sum_tile(const uint8_t* const* rows, const Run* runs, int64_t n_runs, const uint8_t* panel,
              Sum* out, int shift, bool is_first) {
  constexpr int64_t width = J * kLanes;
  // `all` sums pairs of bytes as 16-bit numbers modulo 2^16; with the sums of the odd bytes apart,
  // those of the even bytes follow.
  Vec all[P][J], odd[P][J], bytes[P][J];
  for (int p = 0; p < P; ++p) {
    for (int j = 0; j < J; ++j) all[p][j] = odd[p][j] = bytes[p][j] = zero();
  }
  auto widen = [&] {
    for (int p = 0; p < P; ++p) {
      for (int j = 0; j < J; ++j) {
        all[p][j] = add16(all[p][j], bytes[p][j]);
        odd[p][j] = add16(odd[p][j], odd_bytes(bytes[p][j]));
        bytes[p][j] = zero();
      }
    }
  };
  int64_t room = Tables::kDepth;
  for (int64_t r = 0; r < n_runs; ++r) {
    const uint8_t* index = panel + runs[r].index * width;
    const uint8_t* row[P];
    for (int p = 0; p < P; ++p) row[p] = rows[p] + runs[r].source * Tables::kStepBytes;
    auto step = [&](int64_t s) {
      Vec signs[J];
      for (int j = 0; j < J; ++j) signs[j] = load(index + s * width + j * kLanes);
      for (int p = 0; p < P; ++p) {
        const Vec table = Tables::at(row[p], s);
        for (int j = 0; j < J; ++j) bytes[p][j] = add8(bytes[p][j], lookup(table, signs[j]));
      }
    };
    int64_t s = 0;
    if constexpr (Tables::kDepth == 4) {
      for (; s + 4 <= runs[r].count; s += 4) {
        step(s);
        step(s + 1);
        step(s + 2);
        step(s + 3);
        widen();
      }
      for (; s < runs[r].count; ++s) step(s);
      if (runs[r].count % 4) widen();
    } else {
      while (s < runs[r].count) {
        const int64_t end = std::min(runs[r].count, s + room);
        room -= end - s;
        for (; s < end; ++s) step(s);
        if (room == 0) {
          widen();
          room = Tables::kDepth;
        }
      }
    }
  }
  if (room < Tables::kDepth) widen();
  for (int p = 0; p < P; ++p) {
    for (int j = 0; j < J; ++j) {
      Sum* to = out + p * width + j * kLanes;
      accumulate(to, even_sums(all[p][j], odd[p][j]), shift, is_first);
      accumulate(to + kLanes / 2, odd[p][j], shift, is_first);
    }
  }
}

// How many accumulators fit the registers. Code tables widen every few steps, so that their
// 16-bit sums must stay in registers too.
template <typename Tables>
constexpr int kTile = Tables::kDepth > 4 ? kRegisters / 2 : kRegisters / 4;

// The widest panel, in vectors; its tile still has two rows.
template <typename Tables>
constexpr int kMaxVectors = std::min(kTile<Tables> / 2, 4);

// All of `n_rows` rows for a panel of J vectors.
template <int J, typename Tables, typename Sum>
void sum_rows(const uint8_t* const* rows, int64_t n_rows, const Run* runs, int64_t n_runs,
              const uint8_t* panel, Sum* out, int shift, bool is_first) {
  constexpr int P = std::min(kTile<Tables> / J, 4);
  int64_t i = 0;
  for (; i + P <= n_rows; i += P) {
    sum_tile<P, J, Tables>(rows + i, runs, n_runs, panel, out + i * J * kLanes, shift, is_first);
  }
  for (; i < n_rows; ++i) {
    sum_tile<1, J, Tables>(rows + i, runs, n_runs, panel, out + i * J * kLanes, shift, is_first);
  }
}

// The same for a panel of `width` bytes.
template <typename Tables, typename Sum>
void sum_rows(int64_t width, const uint8_t* const* rows, int64_t n_rows, const Run* runs,
              int64_t n_runs, const uint8_t* panel, Sum* out, int shift, bool is_first) {
  if constexpr (kMaxVectors<Tables> >= 4) {
    if (width == 4 * kLanes) {
      return sum_rows<4, Tables>(rows, n_rows, runs, n_runs, panel, out, shift, is_first);
    }
  }
  if (width == 2 * kLanes) {
    return sum_rows<2, Tables>(rows, n_rows, runs, n_runs, panel, out, shift, is_first);
  }
  return sum_rows<1, Tables>(rows, n_rows, runs, n_runs, panel, out, shift, is_first);
}

}  // namespace fqt::FQT_ISA
