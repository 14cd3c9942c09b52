// Counts of pieces on disk: runs sorted by the bytes of the pieces, in one temporary file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "piece_table.hpp"
#include "watch.hpp"

namespace tinylm {

// A file that nobody else sees and that is gone when its owner is, however that ends (where the
// system can remove open files; elsewhere, unless the process is killed). Errors of the disk are
// thrown as std::system_error.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& folder);
  ~TemporaryFile();
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  std::fpos_t position() const;
  void seek(const std::fpos_t& position) const;
  void write(const std::string& bytes) const;
  // Appends up to `size` bytes to `buffer` and says how many; fewer only at the end of the file.
  std::size_t read(std::size_t size, std::string& buffer) const;

 private:
  std::FILE* file_;
  std::string path_;  // empty if already removed
};

// Not safe to use from several threads at once.
class PieceRuns {
 public:
  // The file is made in `folder`, when it is first needed.
  explicit PieceRuns(std::string folder) : folder_(std::move(folder)) {}

  bool empty() const { return runs_.empty(); }
  // How many distinct pieces there are; needs at most one run.
  std::int64_t size() const { return runs_.empty() ? 0 : runs_.front().size; }

  // Writes a run of `pieces`, which are sorted and distinct. Stopped or failed, it leaves all as it
  // was. Runs are joined before they become too many to be read side by side.
  void add(const std::vector<PieceCount>& pieces, Watch& watch);

  // Joins all runs into one: n log k for n pieces in k runs, in constant memory (but for the
  // longest piece). Stopped or failed, it leaves all as it was.
  void join(Watch& watch);

  // Calls function(PieceCount) for all pieces in order, each valid during the call; equal pieces of
  // several runs are one. Linear where there is one run.
  void for_each(const std::function<void(const PieceCount&)>& function, Watch& watch) const;

 private:
  struct Run {
    std::fpos_t begin;
    std::int64_t size;  // in pieces
  };
  class Reader;
  class Writer;

  std::string folder_;
  std::unique_ptr<TemporaryFile> file_;
  std::fpos_t end_{};  // of the last run
  std::vector<Run> runs_;
};

}  // namespace tinylm
