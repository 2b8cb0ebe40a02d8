"""Verify an archive of `torch.save`, every bit of it: the records by their checksums, and the directory by its form.

`torch.save` writes a zip archive whose records have checksums. What stands before a record, and the directory, have
none, and a bit that changed there makes `torch.load` read other memory, or memory that nobody wrote. But they have only
one form: since version 1.6 torch writes the same bytes for the same records. So the form is written once more, and
compared.
"""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from typing import IO, NamedTuple

import torch

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how the format before torch 1.6 begins, which has no checksums
CHUNK = 1 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_TAIL = _END64.size + _LOCATOR.size + _END.size
_16, _32 = 0xFFFF, 0xFFFFFFFF  # a larger number stands in a second, wider field
_SIZE, _MADE_BY, _NEEDED = 44, 0x031E, 45  # of the wide end record: its length, and versions of the format


class Damaged(Exception):
    """A checkpoint is not what was written. The message is a sentence."""


class _Record(NamedTuple):
    """A record as the directory has it, and the bytes that torch writes about it."""

    name: bytes
    checksum: int
    size: int
    offset: int

    def wide(self, in_directory: bool) -> bytes:
        """Numbers of more than 32 bits. Before the data the second size, of compressed data, is not known yet."""
        numbers = [self.size, self.size * in_directory] * (self.size >= _32) + [self.offset] * (self.offset >= _32)
        return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    @property
    def flags(self) -> int:
        return 0x0808 if self.size else 0x0800  # names are UTF-8; the checksum follows the data

    def entry(self) -> bytes:
        """In the directory."""
        size, wide = min(self.size, _32), self.wide(in_directory=True)
        lengths = len(self.name), len(wide)
        numbers = (0, 0, self.flags, 0, 0, 0, self.checksum, size, size, *lengths, 0, 0, 0, 0, min(self.offset, _32))
        return _ENTRY.pack(b"PK\1\2", *numbers) + self.name + wide

    def header(self, extra: int) -> bytes:
        """Before the data, which a padding of `extra` bytes aligns."""
        wide = self.wide(in_directory=False)
        padding = extra - len(wide) - 4
        if padding < 0:
            return b""
        fixed = _LOCAL.pack(b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.name), extra)
        return fixed + self.name + wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding

    def footer(self) -> bytes:
        """After the data."""
        form = "<4sL2Q" if self.wide(in_directory=True) else "<4s3L"
        return struct.pack(form, b"PK\7\10", self.checksum, self.size, self.size) if self.size else b""


def check(file: IO[bytes], name: str) -> None:
    """Read an archive once, from its beginning to its end, in pieces.

    Raises:
        Damaged: if a bit of it is not as `torch.save` wrote it.
    """
    try:
        if _form_is_known():
            _check_form(file)
        else:
            _check_records_alone(file)
    except _Wrong as wrong:
        raise Damaged(f"{name} {wrong}") from None


class _Wrong(Exception):
    """What is wrong, without the name of the file."""


def _check_form(file: IO[bytes]) -> None:
    records, directory = _directory(file)
    without_checksums = all(record.checksum == 0 for record in records)  # torch.serialization.set_crc32_options(False)
    file.seek(0)
    for record in records:
        if file.tell() != record.offset:
            raise _changed("directory")
        _check_record(file, record, without_checksums)
    if file.tell() != directory:
        raise _changed("directory")


def _directory(file: IO[bytes]) -> tuple[list[_Record], int]:
    """The records, and where the directory begins."""
    length = file.seek(0, io.SEEK_END)
    if length == 0:
        raise _Wrong("is empty.")
    file.seek(max(0, length - _TAIL))
    tail = file.read(_TAIL)
    if len(tail) < _TAIL or tail[-_END.size :][:4] != b"PK\5\6":
        raise _Wrong("is truncated, or not a file of torch.save, or something was appended to it.")
    count, size, start = _END64.unpack_from(tail)[-3:]
    if start + size + _TAIL != length or tail != _tail(count, size, start):
        raise _changed("end")
    file.seek(start)
    directory, at, records = file.read(size), 0, []
    while at < size:
        record = _record(directory, at)
        entry = record.entry()
        if directory[at : at + len(entry)] != entry:
            raise _changed("directory")
        at += len(entry)
        records.append(record)
    if len(records) != count:
        raise _changed("directory")
    return records, start


def _tail(count: int, size: int, start: int) -> bytes:
    """The records at the end of an archive, for a directory of `count` entries and `size` bytes at `start`."""
    end64 = _END64.pack(b"PK\6\6", _SIZE, _MADE_BY, _NEEDED, 0, 0, count, count, size, start)
    locator = _LOCATOR.pack(b"PK\6\7", 0, (start + size) % (1 << 64), 1)
    few = min(count, _16)
    return end64 + locator + _END.pack(b"PK\5\6", 0, 0, few, few, min(size, _32), min(start, _32), 0)


def _record(directory: bytes, at: int) -> _Record:
    try:
        fields = _ENTRY.unpack_from(directory, at)
        checksum, size, (name, extra), offset = fields[7], fields[8], fields[10:12], fields[16]
        at += _ENTRY.size + name
        numbers = list(struct.unpack_from(f"<{extra // 8}Q", directory, at + 4)) if extra else []
    except struct.error:
        raise _changed("directory") from None
    if size == _32 and numbers:
        size, numbers = numbers[0], numbers[2:]
    if offset == _32 and numbers:
        offset = numbers[0]
    return _Record(directory[at - name : at], checksum, size, offset)


def _check_record(file: IO[bytes], record: _Record, without_checksums: bool) -> None:
    name = record.name.decode(errors="replace")
    fixed = file.read(_LOCAL.size)
    header = record.header(int.from_bytes(fixed[-2:], "little"))
    if not header or fixed + file.read(len(header) - _LOCAL.size) != header:
        raise _changed(f"beginning of {name}")
    checksum, left = 0, record.size
    while left and (data := file.read(min(left, CHUNK))):
        checksum, left = zlib.crc32(data, checksum), left - len(data)
    if left or (checksum != record.checksum and not without_checksums):
        raise _Wrong(f"was changed after it was written: the checksum of {name} does not match.")
    footer = record.footer()
    if file.read(len(footer)) != footer:
        raise _changed(f"checksum of {name}")


def _changed(what: str) -> _Wrong:
    return _Wrong(f"was changed after it was written: its {what} is not as torch.save writes it.")


@functools.cache
def _form_is_known() -> bool:
    """Whether the installed torch writes this form. A later one may write another, and its files must load."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1, dtype=torch.float32, device="cpu")}, file)
    try:
        _check_form(file)
    except _Wrong:
        return False
    return True


def _check_records_alone(file: IO[bytes]) -> None:
    """What can be verified without knowing the form."""
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile believes what it reads, so anything may be raised
        raise _Wrong(f"is truncated, or not a file of torch.save ({error}).") from None
    if wrong:
        raise _Wrong(f"was changed after it was written: the checksum of {wrong} does not match.")
