#include "piece_runs.hpp"

#include <cerrno>
#include <queue>
#include <random>
#include <system_error>

namespace tinylm {

namespace {

#ifdef TINYLM_FUZZING  // Small, so that what is small for a file goes through all of it.
constexpr std::size_t kMaxRuns = 4, kBufferBytes = 16;
#else
constexpr std::size_t kMaxRuns = 64;
constexpr std::size_t kBufferBytes = std::size_t{1} << 16;  // of each run that is read or written
#endif
constexpr std::size_t kPollPieces = std::size_t{1} << 12;

[[noreturn]] void fail() { throw std::system_error(errno, std::generic_category()); }

std::string random_name() {
  std::random_device random;
  std::string name = "tinylm-";
  for (int i = 0; i < 20; ++i) name.push_back(static_cast<char>('a' + random() % 26));
  return name;
}

}  // namespace

// Exclusive, so nobody can have put a link there.
TemporaryFile::TemporaryFile(const std::string& folder) : path_(folder + "/" + random_name()) {
  file_ = std::fopen(path_.c_str(), "w+bx");
  if (file_ == nullptr) fail();
  if (std::remove(path_.c_str()) == 0) path_.clear();
}

TemporaryFile::~TemporaryFile() {
  std::fclose(file_);
  if (!path_.empty()) std::remove(path_.c_str());
}

std::fpos_t TemporaryFile::position() const {
  std::fpos_t position;
  if (std::fgetpos(file_, &position) != 0) fail();
  return position;
}

void TemporaryFile::seek(const std::fpos_t& position) const {
  if (std::fsetpos(file_, &position) != 0) fail();
}

void TemporaryFile::write(const std::string& bytes) const {
  if (std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size()) fail();
}

std::size_t TemporaryFile::read(std::size_t size, std::string& buffer) const {
  const std::size_t before = buffer.size();
  buffer.resize(before + size);
  const std::size_t count = std::fread(&buffer[before], 1, size, file_);
  if (count < size && std::ferror(file_) != 0) fail();
  buffer.resize(before + count);
  return count;
}

// A run is, for each piece, its length, its bytes and its count; numbers have seven bits in each
// byte, the lowest first, and the high bit where more follow.
class PieceRuns::Writer {
 public:
  explicit Writer(const TemporaryFile& file) : file_(file), begin_(file.position()) {}

  void add(const PieceCount& entry) {
    put(entry.piece.size());
    buffer_.append(entry.piece);
    put(static_cast<std::uint64_t>(entry.count));
    ++size_;
    if (buffer_.size() >= kBufferBytes) flush();
  }

  Run finish() {
    flush();
    return {begin_, size_};
  }

 private:
  void put(std::uint64_t number) {
    for (; number >= 0x80; number >>= 7) buffer_.push_back(static_cast<char>(number | 0x80));
    buffer_.push_back(static_cast<char>(number));
  }

  void flush() {
    file_.write(buffer_);
    buffer_.clear();
  }

  const TemporaryFile& file_;
  std::fpos_t begin_;
  std::string buffer_;
  std::int64_t size_ = 0;
};

// Where one run is read; several may read one file in turn.
class PieceRuns::Reader {
 public:
  Reader(const TemporaryFile& file, const Run& run)
      : file_(file), position_(run.begin), left_(run.size) {}

  // The piece that `next` went to; valid until it is called again.
  const PieceCount& current() const { return current_; }

  // Goes on to the next piece, if there is one.
  bool next() {
    if (left_ == 0) return false;
    --left_;
    if (at_ >= kBufferBytes) {
      buffer_.erase(0, at_);
      at_ = 0;
    }
    const auto length = static_cast<std::size_t>(number());
    while (buffer_.size() - at_ < length) read_more();
    const std::size_t begin = at_;
    at_ += length;
    const auto count = static_cast<std::int64_t>(number());  // may move the buffer
    current_ = {std::string_view(buffer_).substr(begin, length), count};
    return true;
  }

 private:
  std::uint64_t number() {
    std::uint64_t number = 0;
    for (int shift = 0;; shift += 7) {
      if (at_ == buffer_.size()) read_more();
      const auto byte = static_cast<unsigned char>(buffer_[at_++]);
      number |= std::uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return number;
    }
  }

  void read_more() {
    file_.seek(position_);
    if (file_.read(kBufferBytes, buffer_) == 0)
      throw std::system_error(EIO, std::generic_category());
    position_ = file_.position();
  }

  const TemporaryFile& file_;
  std::fpos_t position_;
  std::int64_t left_;
  std::string buffer_;
  std::size_t at_ = 0;  // in buffer_
  PieceCount current_{};
};

void PieceRuns::add(const std::vector<PieceCount>& pieces, Watch& watch) {
  if (pieces.empty()) return;
  if (runs_.size() == kMaxRuns) join(watch);
  if (file_ == nullptr) {
    file_ = std::make_unique<TemporaryFile>(folder_);
    end_ = file_->position();
  }
  file_->seek(end_);
  Writer writer(*file_);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (i % kPollPieces == 0) watch.poll();
    writer.add(pieces[i]);
  }
  runs_.push_back(writer.finish());
  end_ = file_->position();
}

void PieceRuns::join(Watch& watch) {
  if (runs_.size() < 2) return;
  auto file = std::make_unique<TemporaryFile>(folder_);
  Writer writer(*file);
  for_each([&](const PieceCount& entry) { writer.add(entry); }, watch);
  runs_ = {writer.finish()};
  end_ = file->position();
  file_ = std::move(file);
}

void PieceRuns::for_each(const std::function<void(const PieceCount&)>& function,
                         Watch& watch) const {
  std::vector<Reader> readers;
  for (const Run& run : runs_) readers.emplace_back(*file_, run);
  const auto is_after = [&](std::size_t a, std::size_t b) {
    return readers[a].current().piece > readers[b].current().piece;
  };
  std::priority_queue<std::size_t, std::vector<std::size_t>, decltype(is_after)> queue(is_after);
  const auto go_on = [&](std::size_t reader) {
    if (readers[reader].next()) queue.push(reader);
  };
  for (std::size_t i = 0; i < readers.size(); ++i) go_on(i);
  for (std::size_t pieces = 0; !queue.empty(); ++pieces) {
    if (pieces % kPollPieces == 0) watch.poll();
    const std::size_t first = queue.top();
    queue.pop();
    PieceCount entry = readers[first].current();
    while (!queue.empty() && readers[queue.top()].current().piece == entry.piece) {
      const std::size_t other = queue.top();
      queue.pop();
      entry.count += readers[other].current().count;
      go_on(other);
    }
    function(entry);
    go_on(first);
  }
}

}  // namespace tinylm
