// What the forward product and the input gradient have in common: each output position sums over
// the taps that meet it, with lanes that are channels and tables that stand in an image.

namespace fqt::FQT_ISA {

// A panel's part that an inner loop reads again and again has to stay in the first-level cache.
constexpr int64_t kBlockBytes = 16384;

// Image of tables: step g of the position (y, x) of a sample is at
// data + sample * sample_bytes + (y - first_y) * row_bytes + x * position_bytes + g * kStepBytes.
struct Image {
  const uint8_t* data;
  int64_t sample_bytes, row_bytes, position_bytes, first_y;
};

// The runs of one row and class of columns, relative to the first entry that they meet, in blocks.
template <typename Tables>
std::vector<std::vector<Run>> make_blocks(const Meeting& row, const PositionClass& columns,
                                          int64_t window_width, int64_t groups, const Image& image,
                                          int64_t panel_width) {
  const int64_t limit = std::min(kBlockBytes / panel_width, kMaxSteps<Tables>);
  const int64_t total = row.count * columns.count * groups;
  const int64_t n_blocks = (total + limit - 1) / limit;
  const int64_t size = n_blocks ? (total + n_blocks - 1) / n_blocks : 0;
  std::vector<std::vector<Run>> blocks;
  int64_t room = 0;
  for (int64_t i = 0; i < row.count; ++i) {
    for (int64_t j = 0; j < columns.count; ++j) {
      const int64_t tap =
          (row.tap + i * row.tap_step) * window_width + columns.tap + j * columns.tap_step;
      Run run{(i * row.source_step * image.row_bytes +
               j * columns.source_step * image.position_bytes) /
                  Tables::kStepBytes,
              tap * groups, groups};
      while (run.count > 0) {
        if (room == 0) {
          blocks.emplace_back();
          room = size;
        }
        const int64_t here = std::min(room, run.count);
        append_run(blocks.back(), {run.source, run.index, here});
        run = {run.source + here, run.index + here, run.count - here};
        room -= here;
      }
    }
  }
  return blocks;
}

// How a product over samples, rows and panels is cut into tasks.
struct Cut {
  int64_t samples, rows, panels;                       // in a task, at most
  int64_t sample_blocks, row_blocks, panel_blocks;     // of tasks

  int64_t tasks() const { return sample_blocks * row_blocks * panel_blocks; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Starts from blocks of `samples` samples and `rows` rows; cuts finer while there are too few tasks
// for the threads. Panels go before rows only where `prefer_panels`.
inline Cut make_cut(int64_t n_samples, int64_t samples, int64_t n_rows, int64_t rows,
                    int64_t n_panels, bool prefer_panels, int64_t threads) {
  Cut cut{};
  cut.samples = std::clamp<int64_t>(samples, 1, std::max<int64_t>(1, n_samples));
  cut.rows = std::clamp<int64_t>(rows, 1, std::max<int64_t>(1, n_rows));
  cut.panels = std::max<int64_t>(1, n_panels);
  const int64_t wanted = threads > 1 ? 3 * threads : 1;
  for (;;) {
    cut.sample_blocks = ceil_div(n_samples, cut.samples);
    cut.row_blocks = ceil_div(n_rows, cut.rows);
    cut.panel_blocks = ceil_div(n_panels, cut.panels);
    if (cut.tasks() >= wanted || cut.tasks() == 0) return cut;
    if (cut.panels > 1 && prefer_panels) {
      cut.panels = ceil_div(cut.panels, 2);
    } else if (cut.samples > 8) {
      cut.samples = ceil_div(cut.samples, 2);
    } else if (cut.rows > 4) {
      cut.rows = ceil_div(cut.rows, 2);
    } else if (cut.samples > 1) {
      cut.samples = ceil_div(cut.samples, 2);
    } else if (cut.panels > 1) {
      cut.panels = ceil_div(cut.panels, 2);
    } else {
      return cut;
    }
  }
}

}  // namespace fqt::FQT_ISA
