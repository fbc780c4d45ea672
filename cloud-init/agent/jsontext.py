"""JSON without the module of that name, whose import costs an emulated guest 300 ms (for `re`)."""

try:
    import _json

    class _Context:
        strict, memo = True, {}
        object_hook = object_pairs_hook = None
        parse_float, parse_int, parse_constant = float, int, float

    _scan = _json.make_scanner(_Context)
    _encode = _json.make_encoder(None, None, _json.encode_basestring_ascii, None, ":", ",", False, False, True)

    def parse_json(data):
        """ValueError for what is no JSON, or more than one value."""
        text = str(data, "utf-8").strip()
        try:
            value, end = _scan(text, 0)
        except (StopIteration, SystemError):  # the latter where the C code misses its exception's Python half
            raise ValueError("no JSON") from None
        if end != len(text):
            raise ValueError("more than one JSON value")
        return value

    def to_json(value):
        return "".join(_encode(value, 0)).encode()

    if parse_json(to_json({"a": [1, "é", None, True]})) != {"a": [1, "é", None, True]}:
        raise ImportError("_json is not as it was")
except (ImportError, AttributeError, TypeError):
    import json

    def parse_json(data):
        return json.loads(data)

    def to_json(value):
        return json.dumps(value, separators=(",", ":")).encode()
