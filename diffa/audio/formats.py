"""File formats: what is read, links of chained streams, and WAV headers that were never finished.

libsndfile reads the first link of a chained stream alone, and believes a WAV header.
"""

from __future__ import annotations

import re
from mmap import mmap
from typing import NamedTuple

FORMATS = ("wav", "mp3", "flac", "ogg")
"""Formats that are read without an extra."""
MORE_FORMATS = ("m4a", "mp4", "aac", "webm", "opus", "mka")
"""Endings of further formats, which PyAV reads (``pip install 'diffa-audio[audio]'``)."""
MAX_FRAMES = 100_000_000
"""Frames (samples of one channel) of the longest file that is decoded, unless told otherwise."""

_UNFINISHED = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # sizes in a WAV header whose writer was stopped
_SLACK = 0x1000  # writers subtract the header from such a size
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # the marker and the head of STREAMINFO
_XING = re.compile(rb"(?:Xing|Info)\x00\x00\x00[\x00-\x0f]")
_ID3 = re.compile(rb"ID3[\x02-\x04][\x00-\x0a][\x00\xe0\xf0][\x00-\x7f]{4}")
_XING_OFFSETS = (36, 21, 13)  # from the frame's header: MPEG 1 stereo, 1 mono or 2 stereo, 2 mono


class WavData(NamedTuple):
    """The data chunk of a WAV file.

    Attributes:
        at: Where its samples begin, in bytes.
        claimed: Bytes that the header claims; None if the header was never finished.
        present: Bytes that are there.
        frame: Bytes of one frame.
    """

    at: int
    claimed: int | None
    present: int
    frame: int


def has_known_header(head: bytes) -> bool:
    """Return whether the first four bytes are those of one of ``FORMATS``."""
    mpeg_frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return head in (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS") or head[:3] == b"ID3" or mpeg_frame


def find_container(head: bytes) -> str | None:
    """Return FFmpeg's name of a webm (mka) or m4a (mp4) file by its first 12 bytes, or None.

    Naming it keeps FFmpeg's other readers, which follow addresses, from untrusted data.
    """
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "mov" if head[4:8] == b"ftyp" else None


def find_wav_data(data: bytes, size: int) -> WavData | None:
    """Find the data chunk of a little-endian WAV file.

    Args:
        data: Its first bytes.
        size: Bytes of the whole file.

    Returns:
        None for another format, or if the chunk does not begin within ``data``.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    at, frame = 12, 1
    while at + 8 <= len(data):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"fmt " and at + 24 <= len(data):
            frame = max(1, int.from_bytes(data[at + 20 : at + 22], "little"))
        if name == b"data":
            present = max(0, size - at - 8)
            near = any(end - _SLACK <= length <= end for end in _UNFINISHED[1:])
            unfinished = (length == 0 and present > 0) or (near and length > present)
            return WavData(at + 8, None if unfinished else length, present, frame)
        at += 8 + length + length % 2
    return None


def finish_wav_header(data: bytes, wav: WavData) -> bytes:
    """Return a WAV file with the sizes that its writer never filled in."""
    present = wav.present - wav.present % wav.frame
    head = bytearray(data[: wav.at])
    head[4:8] = (wav.at + present - 8).to_bytes(4, "little")
    head[wav.at - 4 : wav.at] = present.to_bytes(4, "little")
    return bytes(head) + data[wav.at : wav.at + present]


def finish_flac_header(data: bytes | mmap) -> bytes | None:
    """Return a FLAC file whose header lacks the length with the length of its frames.

    Streaming encoders leave it out, and libsndfile loses the end of such files.

    Returns:
        None for other files, and where no frame is found.
    """
    if data[:4] != b"fLaC" or len(data) < 42 or int.from_bytes(data[21:26], "big") % (1 << 36):
        return None
    block = int.from_bytes(data[10:12], "big")
    at = len(data)
    while (at := data.rfind(b"\xff", max(0, len(data) - (1 << 20)), at)) >= 42:
        if data[at + 1 : at + 2] not in (b"\xf8", b"\xf9"):
            continue
        if (end := _flac_frame_end(data, at, block)) is not None:
            head = bytearray(data[:])
            head[21] |= end >> 32
            head[22:26] = (end & 0xFFFFFFFF).to_bytes(4, "big")
            return bytes(head)
    return None


def _flac_frame_end(data: bytes | mmap, at: int, block: int) -> int | None:
    """Return the number of the sample behind the frame at ``at``; None if none begins there."""
    head = data[at : at + 16]
    if len(head) < 16:
        return None
    code, rate = head[2] >> 4, head[2] & 15
    ones = next((n for n in range(8) if not head[4] << n & 0x80), 8)  # as UTF-8 counts bytes
    extra = max(0, ones - 1)
    number = head[4] & (0x7F >> ones)
    for byte in head[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    place = 5 + extra
    if code in (6, 7):
        size = int.from_bytes(head[place : place + code - 5], "big") + 1
        place += code - 5
    else:
        size = {0: 0, 1: 192}.get(code, 576 << code - 2 if code < 6 else 256 << max(0, code - 8))
    place += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    crc = 0
    for byte in head[:place]:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07 if crc & 0x80 else crc << 1) & 0xFF
    if not size or place >= len(head) or crc != head[place]:
        return None
    return number + size if head[1] & 1 else number * block + size


def find_links(data: bytes | mmap) -> list[int]:
    """Return where the links of a chained Ogg, FLAC or MP3 stream begin; [0] for a single one."""
    if data[:4] == b"OggS":
        return _ogg_links(data)[0]
    if data[:4] == b"fLaC":
        return [match.start() for match in _FLAC.finditer(data)] or [0]
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xE0 == 0xE0):
        return _mp3_links(data)
    return [0]


def is_cut_ogg(data: bytes | mmap) -> bool:
    """Return whether an Ogg file ends without the last page of its streams."""
    return data[:4] == b"OggS" and not _ogg_links(data)[1]


def _ogg_links(data: bytes | mmap) -> tuple[list[int], bool]:
    """Return the first pages of the links, and whether all streams have ended.

    A link begins with the first page of a stream after all others have ended.
    """
    links, open_streams, at = [], set[bytes](), 0
    while at + 27 <= len(data) and data[at : at + 4] == b"OggS":
        flags, serial, segments = data[at + 5], data[at + 14 : at + 18], data[at + 26]
        if flags & 2:  # first page of a stream
            if not open_streams:
                links.append(at)
            open_streams.add(serial)
        if flags & 4:  # last page
            open_streams.discard(serial)
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
        if data[at : at + 4] != b"OggS":  # damaged: go on with the next page
            following = data.find(b"OggS", at)
            at = len(data) if following < 0 else following
    return links or [0], not open_streams


def _mp3_links(data: bytes | mmap) -> list[int]:
    """Return where files were joined: at ID3 tags and at frames that hold a file's length."""
    links, first = [0], 64  # until where the first frame of the newest link may begin
    for match in sorted([*_ID3.finditer(data), *_XING.finditer(data)], key=lambda m: m.start()):
        at = match.start()
        if match[0][:3] == b"ID3":
            size = data[at + 6 : at + 10]
            if at > first:
                links.append(at)
            first = at + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3]) + 2048
            continue
        frames = [at - n for n in _XING_OFFSETS if at >= n and _is_frame(data[at - n : at])]
        if frames and frames[0] > first:
            links.append(frames[0])
            first = frames[0] + 64
    return links


def _is_frame(head: bytes) -> bool:
    return len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2  # MPEG layer III
