"""Lines as strace -f -y -xx prints them."""


def escaped(text):
    data = text.encode() if isinstance(text, str) else text
    return "".join(f"\\x{byte:02x}" for byte in data)


def fd(number, path):
    return f"{number}<{escaped(str(path))}>"


def opened(path, number, flags="O_WRONLY|O_CREAT|O_EXCL"):
    name = escaped(str(path))
    return f'7 openat(AT_FDCWD<{escaped("/")}>, "{name}", {flags}, 0644) = {fd(number, path)}'


def written(path, number, data, name="write", at=None):
    tail = "" if at is None else f", {at}"
    return f'7 {name}({fd(number, path)}, "{escaped(data)}", {len(data)}{tail}) = {len(data)}'


def synced(path, number, result="0"):
    return f"7 fsync({fd(number, path)}) = {result}"


def moved(source, target):
    return f'7 rename("{escaped(str(source))}", "{escaped(str(target))}") = 0'
