"""JSON schemas put together at random of small pieces that meet often: few names, small numbers, short texts."""

NAMES = ("a", "b", "ab", "c")
VALUES = (None, True, False, 0, 1, 1.0, 2, -1, 0.5, 3.25, "", "a", "ab", "b1", [], [1], [True, "a"], [0, 0], {},
          {"a": 1}, {"a": "a", "b": None}, {"ab": [1]})
PATTERNS = ("^a", "b$", "^[ab]*$", "1", "^a?b?$", "^.{2}$", "^(?!ab)", "^(?=a).*1$", r"^\w+$", "(?i)^A", "a{1,2}")
NAME_PATTERNS = ("^a", "b", "^[ab]$", "^.$", "^(?!a)")
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def random_schema(rng, depth=3, recursive=True):
    """One of the latest draft, or with ``$schema`` one of draft 7."""
    old = rng.random() < 0.3
    maker = _Maker(rng, old, recursive and rng.random() < 0.15)
    schema = maker.schema(depth)
    if not isinstance(schema, dict):
        return schema
    if maker.recursive:
        schema = {**schema, "definitions": {"node": maker.node(depth)}}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema} if old else schema


class _Maker:
    def __init__(self, rng, old, recursive):
        self.rng, self.old, self.recursive = rng, old, recursive

    def schema(self, depth):
        rng = self.rng
        if rng.random() < 0.07:
            return rng.random() < 0.7
        if self.recursive and depth < 3 and rng.random() < 0.2:
            return {"$ref": "#/definitions/node"}
        schema = {}
        if rng.random() < 0.45:
            schema["type"] = rng.choice(TYPES) if rng.random() < 0.7 else rng.sample(TYPES, rng.randint(1, 3))
        pieces = [self.numbers, self.strings, self.enums]
        if depth > 0:
            pieces += [self.objects, self.objects, self.arrays, self.arrays, self.combined, self.combined, self.either]
        for piece in rng.sample(pieces, rng.choice((1, 1, 2, 2, 3))):
            schema |= piece(depth - 1)
        return schema

    def node(self, depth):
        """A definition that refers to itself, with a way to end."""
        rest = {"anyOf": [{"type": "null"}, {"$ref": "#/definitions/node"}]}
        return self.rng.choice([
            {"type": "object", "properties": {"a": rest, "b": self.schema(1)}, "required": ["a"]},
            {"type": "array", "items": {"$ref": "#/definitions/node"}, "maxItems": 2},
            {"anyOf": [self.schema(0), {"type": "array", "items": rest}]}])

    def some(self, pairs, least=1):
        pairs = list(pairs.items())
        return {key: make() for key, make in self.rng.sample(pairs, self.rng.randint(least, min(3, len(pairs))))}

    def numbers(self, depth):
        rng = self.rng
        low = rng.choice((-3, -1, 0, 0.5, 1, 2.5))
        return self.some({"minimum": lambda: low, "maximum": lambda: low + rng.choice((0, 0.25, 1, 3, 20)),
                          "exclusiveMinimum": lambda: low, "exclusiveMaximum": lambda: low + rng.choice((1, 2, 10)),
                          "multipleOf": lambda: rng.choice((1, 2, 3, 0.5, 0.01, 2.5))})

    def strings(self, depth):
        rng = self.rng
        return self.some({"minLength": lambda: rng.randint(0, 3), "maxLength": lambda: rng.randint(0, 5),
                          "pattern": lambda: rng.choice(PATTERNS),
                          "format": lambda: rng.choice(("date", "email", "uuid", "made-up", "ipv4"))})

    def enums(self, depth):
        if self.rng.random() < 0.3:
            return {"const": self.rng.choice(VALUES)}
        return {"enum": self.rng.sample(VALUES, self.rng.randint(1, 6))}

    def objects(self, depth):
        rng = self.rng
        names = rng.sample(NAMES, rng.randint(1, 3))
        keys = {
            "properties": lambda: {name: self.schema(depth) for name in names},
            "required": lambda: rng.sample(NAMES, rng.randint(0, 2)),
            "additionalProperties": lambda: rng.choice((False, True, self.schema(depth))),
            "patternProperties": lambda: {pattern: self.schema(depth) for pattern in
                                          rng.sample(NAME_PATTERNS, rng.randint(1, 2))},
            "propertyNames": lambda: rng.choice(({"enum": names}, {"pattern": rng.choice(NAME_PATTERNS)},
                                                 {"maxLength": 1}, self.schema(0))),
            "minProperties": lambda: rng.randint(0, 3), "maxProperties": lambda: rng.randint(0, 3)}
        if self.old:
            keys["dependencies"] = lambda: {names[0]: rng.choice((rng.sample(NAMES, 1), self.schema(depth)))}
        else:
            keys |= {"dependentRequired": lambda: {names[0]: rng.sample(NAMES, rng.randint(0, 2))},
                     "dependentSchemas": lambda: {names[-1]: self.schema(depth)},
                     "unevaluatedProperties": lambda: rng.choice((False, self.schema(depth)))}
        return self.some(keys)

    def arrays(self, depth):
        rng = self.rng
        items = [self.schema(depth) for _ in range(rng.randint(1, 2))]
        one = {} if isinstance(items[0], bool) else items[0]  # beside additionalItems `jsonschema` breaks on a boolean
        keys = {"minItems": lambda: rng.randint(0, 3), "maxItems": lambda: rng.randint(0, 3),
                "uniqueItems": lambda: rng.random() < 0.8, "contains": lambda: self.schema(depth)}
        if self.old:
            keys |= {"items": lambda: rng.choice((items, one)), "additionalItems": lambda: self.schema(depth)}
        else:
            keys |= {"items": lambda: items[0], "prefixItems": lambda: items,
                     "minContains": lambda: rng.randint(0, 2), "maxContains": lambda: rng.randint(0, 2),
                     "unevaluatedItems": lambda: rng.choice((False, self.schema(depth)))}
        return self.some(keys)

    def combined(self, depth):
        key = self.rng.choice(("allOf", "anyOf", "oneOf", "oneOf", "not"))
        if key == "not":
            return {"not": self.schema(depth)}
        return {key: [self.schema(depth) for _ in range(self.rng.randint(1, 3))]}

    def either(self, depth):
        schema = {"if": self.schema(depth)}
        return schema | {key: self.schema(depth) for key in self.rng.sample(("then", "else"), self.rng.randint(1, 2))}
