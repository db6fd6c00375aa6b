"""The few things that packing asks of a program: which libraries it needs, of which versions, and where it looks for them."""

import struct

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB, DT_RUNPATH = 1, 5, 29
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF


class Elf:
    """A program of 64 bits, little-endian, as bytes that can be changed."""

    def __init__(self, data):
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no ELF file of 64 bits, little-endian")
        self.data = bytearray(data)
        start, size, count = self.at("<Q", 32)[0], self.at("<H", 54)[0], self.at("<H", 56)[0]
        headers = [self.at("<IIQQQQQQ", start + i * size) for i in range(count)]
        self.loads = [(vaddr, offset, filesz) for kind, _, offset, vaddr, _, filesz, _, _ in headers if kind == PT_LOAD]
        offset, length = next((h[2], h[5]) for h in headers if h[0] == PT_DYNAMIC)
        self.dynamic = [self.at("<QQ", offset + i) for i in range(0, length, 16)]
        self.strings = self.place(self.tag(DT_STRTAB))

    def at(self, form, offset):
        return struct.unpack_from(form, self.data, offset)

    def tag(self, wanted):
        return next((value for tag, value in self.dynamic if tag == wanted), None)

    def place(self, address):
        """Where in the file an address of the program is."""
        return next(address - vaddr + offset for vaddr, offset, size in self.loads if vaddr <= address < vaddr + size)

    def text(self, offset):
        start = self.strings + offset
        return self.data[start : self.data.index(0, start)].decode()

    def needed(self):
        return [self.text(value) for tag, value in self.dynamic if tag == DT_NEEDED]

    def versions(self):
        """All versions of symbols that it asks of libraries, such as GLIBC_2.34."""
        found, count = set(), self.tag(DT_VERNEEDNUM) or 0
        entry = self.place(self.tag(DT_VERNEED)) if count else 0
        for _ in range(count):
            _, auxiliaries, _, first, following = self.at("<HHIII", entry)
            auxiliary = entry + first
            for _ in range(auxiliaries):
                _, _, _, name, step = self.at("<IHHII", auxiliary)
                found.add(self.text(name))
                auxiliary += step
            entry += following
        return found

    def runpath(self):
        offset = self.tag(DT_RUNPATH)
        return None if offset is None else self.text(offset)

    def look_in(self, runpath):
        """Replaces the folders in which libraries are looked for, in place: by no longer text."""
        before = self.runpath()
        if len(runpath) > len(before):
            raise ValueError(f"{runpath!r} has no room where {before!r} is")
        start = self.strings + self.tag(DT_RUNPATH)
        self.data[start : start + len(before)] = runpath.encode().ljust(len(before), b"\0")
