"""A small writer of TFRecord files, to test the reader by."""

import google_crc32c


def varint(value):
    value %= 2**64  # negative numbers are written as their complement
    digits = []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def int64_list(ids, packed=True):
    if packed:
        return field(1, b"".join(map(varint, ids)))
    return b"".join(varint(1 << 3) + varint(i) for i in ids)


def example(features):
    """An Example; `features` gives for every name the Feature, serialized."""
    entries = (field(1, name.encode()) + field(2, value) for name, value in features.items())
    return field(1, b"".join(field(1, entry) for entry in entries))


def ids_example(ids, name="text", packed=True):
    return example({name: field(3, int64_list(ids, packed))})


def checksum(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def frame(data):
    size = len(data).to_bytes(8, "little")
    return size + checksum(size) + data + checksum(data)


def tfrecords(documents, **options):
    """A file of a record each."""
    return b"".join(frame(ids_example(ids, **options)) for ids in documents)
