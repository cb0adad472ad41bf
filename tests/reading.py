"""What readers of calibration text give, as lists."""


def texts(reader, count=1):
    return [[piece.text for piece in section] for section in reader.sections(count)]


def everything(reader, count=1):
    return [text for section in texts(reader, count) for text in section]
