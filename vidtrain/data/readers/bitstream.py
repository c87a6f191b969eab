"""What the first bytes of a packet tell without decoding it, for the codecs where that is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# A "not coded" MPEG-4 picture, which stands for "show the last one again", takes 6 to 10 bytes
NOT_CODED_SIZE = 10
H264_SPS = 7


class H264Look(NamedTuple):
    """What a packet of H.264 is."""

    disposable: bool  # no other picture may refer to it (nal_ref_idc, ITU-T H.264 7.4.1)
    intra: bool  # a keyframe that refers to none (slice_type, 7.4.3)
    damaged: bool  # it holds what no encoder writes
    parameters: bytes  # the sequence parameter set it brings along: a new one may change the size


def h264_length_size(extradata: bytes | None) -> int:
    """Return how many bytes hold the length of a NAL unit; 0 where start codes divide them."""
    return (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else 0


def h264_look(packet: memoryview, length_size: int, keyframe: bool) -> H264Look:
    """Look at the heads of the NAL units of one packet."""
    data = bytes(packet)
    slices, reference, intra, damaged, parameters = 0, False, False, False, b""
    for start, end in _nal_units(data, length_size):
        kind = data[start] & 0x1F
        if 1 <= kind <= 5:
            slices += 1
            reference = reference or bool(data[start] & 0x60)
            if keyframe:
                intra = _h264_slice_type(data[start + 1 : start + 9]) in (2, 4, 7, 9)
            damaged = damaged or (length_size > 0 and _has_hole(data, start, end))
        elif kind == H264_SPS:
            parameters = data[start:end]
    return H264Look(slices > 0 and not reference, intra, damaged, parameters)


def hevc_length_size(extradata: bytes | None) -> int:
    """Return how many bytes hold the length of a NAL unit; 0 where start codes divide them."""
    # the hvcC record begins with its version (ISO 14496-15, 8.3.3.1.2)
    return (extradata[21] & 3) + 1 if extradata and len(extradata) > 22 and extradata[0] == 1 else 0


def hevc_look(packet: memoryview, length_size: int) -> tuple[bool, int]:
    """Look at the first slice of a packet of HEVC.

    Returns:
        Whether no picture of its own temporal sub-layer refers to it (nal_unit_type, ITU-T H.265
        7.4.2.2), and which sub-layer that is. Pictures of higher ones may refer to it.
    """
    data = bytes(packet)
    for start, end in _nal_units(data, length_size):
        kind = data[start] >> 1 & 0x3F
        if kind < 32 and end - start > 2:
            return kind < 16 and kind % 2 == 0, (data[start + 1] & 7) - 1
    return False, 0


def _has_hole(data: bytes, start: int, end: int) -> bool:
    """Tell whether three zero bytes stand in a NAL unit, which they cannot (7.4.1).

    In a file that was copied in part they do, and the decoder makes pictures of them without a
    word. At the end they may be padding.
    """
    hole = data.find(b"\0\0\0", start, end)
    return hole >= 0 and any(data[hole:end])


def _nal_units(data: bytes, length_size: int) -> Iterator[tuple[int, int]]:
    size = len(data)
    if length_size:
        at = 0
        while at + length_size < size:
            start = at + length_size
            at = start + int.from_bytes(data[at:start], "big")
            yield start, min(at, size)
        return
    start = data.find(b"\0\0\1")
    while 0 <= start < size - 3:
        end = data.find(b"\0\0\1", start + 3)
        yield start + 3, end if end >= 0 else size
        start = end


def _h264_slice_type(header: bytes) -> int:
    """Read the second Exp-Golomb number of a slice header (9.1); the first is its place."""
    bits = "".join(f"{byte:08b}" for byte in header)
    value, at = -1, 0
    for _ in range(2):
        one = bits.find("1", at)
        if one < 0:
            return -1
        length = one - at + 1
        value = int(bits[one : one + length] or "0", 2) - 1
        at = one + length
    return value


def mpeg4_kinds(packet: memoryview) -> str:
    """Return the kinds of the pictures in a packet: I, P, B or S (ISO 14496-2, 6.2.5)."""
    data = bytes(packet)
    kinds = ""
    at = data.find(b"\0\0\1\xb6")
    while 0 <= at < len(data) - 4:
        kinds += "IPBS"[data[at + 4] >> 6]
        at = data.find(b"\0\0\1\xb6", at + 4)
    return kinds


def mpeg4_order(
    kinds: Sequence[str], sizes: Sequence[int], delayed: bool
) -> tuple[list[int], list[int]] | None:
    """Say in which order pictures of MPEG-4 part 2 are shown, from their kinds alone.

    AVI has no presentation times. B pictures are shown at once, others when the next of the others
    comes. Many AVI files (DivX, XviD, most of UCF-101) are "packed" as well: a B picture travels in
    the packet of the picture before it, and a not-coded picture fills the place it left. The
    decoder keeps such a stowaway and decodes it in place of the next packet; so does this function.

    Args:
        kinds: per packet, as from `mpeg4_kinds`.
        sizes: per packet, in bytes.
        delayed: whether the stream may hold B pictures at all (the decoder's word).

    Returns:
        The packets in showing order, and those where decoding can start; None where it is not
        plain what a decoder would make of it.
    """
    order: list[int] = []
    starts: list[int] = []
    held = -1
    stored = ""  # what the decoder keeps for the next packet
    for packet, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
        not_coded = size <= NOT_CODED_SIZE
        if not kind and not delayed:
            kind = "P"  # damaged, but its place is known
        if not kind or len(stored) > 1 or (not_coded and not stored):
            return None
        if stored:
            if not not_coded and kind[0] not in "IB":
                return None  # the decoder would lose this picture
            shown, stored = stored, "" if not_coded else kind
        else:
            shown, stored = kind[0], kind[1:]
            if stored and stored[0] not in "IB":
                return None
            if shown == "I" and not stored:
                # with a stowaway, which looks behind it, the decoder would fall out of step
                starts.append(packet)
        if shown == "B" or not delayed:
            order.append(packet)
        else:
            if held >= 0:
                order.append(held)
            held = packet
    if held >= 0:
        order.append(held)
    return order, starts
