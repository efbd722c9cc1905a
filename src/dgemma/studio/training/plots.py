"""Curves of a run as ECharts draws them. Works on: `dgemma.train.log.curves`. Knows nothing of: pages."""

from __future__ import annotations

import math
from typing import Any

from dgemma.train.log.curves import Picture
from dgemma.train.log.figures import COLOURS, Curve, thinned

PALETTE = ("#4f7fdb", "#e08a1e", "#0d9488", "#c2549d", "#8a7d2b", "#7a6ff0")  # light and dark
_INK = "#85858f"


def options(picture: Picture) -> dict[str, Any]:
    """One picture's ECharts options."""
    axis = {"axisLine": {"lineStyle": {"color": _INK}}, "splitLine": {"lineStyle": {"color": _INK, "opacity": 0.18}},
            "axisLabel": {"color": _INK, "fontSize": 11}, "nameTextStyle": {"color": _INK, "fontSize": 11}}
    y: dict[str, Any] = {**axis, "type": "log" if picture.y.kind == "log" else "value", "scale": True}
    if picture.y.kind == "percent":
        y |= {"min": 0, "max": 1}
    x = {**axis, "type": "log" if picture.x.kind == "steps" else "value", "name": picture.x.label,
         "nameLocation": "middle", "nameGap": 24, "splitLine": {"show": False}}
    x |= {"logBase": 2} if picture.x.kind == "steps" else {}
    named = [curve.name for curve in picture.curves if curve.name and not curve.faint]
    return {"animation": False, "title": {"text": picture.y.label, "textStyle": {
                "fontSize": 13, "fontWeight": 600, "color": _INK}},
            "grid": {"left": 52, "right": 16, "top": 58 if len(named) > 1 else 38, "bottom": 38},
            "tooltip": {"trigger": "axis", "confine": True},
            "legend": {"show": len(named) > 1, "top": 24, "left": 0, "data": named, "type": "scroll",
                       "itemWidth": 14, "textStyle": {"color": _INK, "fontSize": 11}},
            "xAxis": x, "yAxis": y, "series": [_series(curve) for curve in picture.curves]}


def _series(curve: Curve) -> dict[str, Any]:
    few = thinned(curve)
    points = [[x, y if math.isfinite(y) else None] for x, y in zip(few.x, few.y, strict=True)]
    line = {"width": 1 if curve.faint else 2, "opacity": 0.3 if curve.faint else curve.strength,
            "type": "dashed" if curve.dashed else "solid"}
    return {"type": "line", "name": "" if curve.faint else curve.name, "data": points, "lineStyle": line,
            "color": PALETTE[curve.colour % COLOURS], "showSymbol": not curve.faint and len(points) <= 40,
            "symbolSize": 5, "silent": curve.faint}
