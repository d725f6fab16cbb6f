"""GeoJSON: regions as polygons along the edges of their pixels, in the coordinates of the raster where it has any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .georeference import Georeference
from .picture import File, PictureResult
from .polygons import Polygon

PIXELS = Georeference(None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))


def geojson(found: PictureResult) -> dict[str, File]:
    """A feature for each region, a class or an instance, with `class`, `id`, `score` and `area`.

    Coordinates, and `area` as the square of their unit, are those of the raster's reference system, which a member
    `crs` names as GDAL and QGIS read it; of a picture without one they are pixels, x to the right, y down.
    """
    georeference = found.georeference or PIXELS
    ids, names = found.labels.written_ids, found.labels.class_names
    features = []
    for region in found.regions:
        parts = [_coordinates(part, georeference) for part in found.regions.outlines[region.number]]
        single = len(parts) == 1
        properties: dict[str, Any] = {"class": names[region.class_index], "id": ids[region.class_index]}
        if region.score is not None:
            properties["score"] = round(region.score, 4)
        properties["area"] = region.area * georeference.pixel_area
        geometry = {"type": "Polygon" if single else "MultiPolygon", "coordinates": parts[0] if single else parts}
        features.append({"type": "Feature", "properties": properties, "geometry": geometry})
    collection: dict[str, Any] = {"type": "FeatureCollection"}
    if georeference.crs is not None:
        collection["crs"] = {"type": "name", "properties": {"name": crs_name(georeference.crs)}}
    collection["features"] = features

    def save(path: Path) -> None:
        path.write_text(json.dumps(collection, ensure_ascii=False), encoding="utf-8")

    return {"geojson": File(f"{found.stem}.geojson", save)}


def crs_name(crs: Any) -> str:
    """What a reference system is called in GeoJSON: its URN, or its definition where it has no number."""
    code = crs.to_epsg()
    if code == 4326:  # GeoJSON's own, which has longitude first
        return "urn:ogc:def:crs:OGC:1.3:CRS84"
    return f"urn:ogc:def:crs:EPSG::{code}" if code else str(crs.to_wkt())


def _coordinates(polygon: Polygon, georeference: Georeference) -> list[list[list[float]]]:
    """The closed rings of a polygon, its outline counterclockwise in the plane of the coordinates (RFC 7946)."""
    a, b, c, d, e, f = georeference.transform
    rings = []
    for ring in polygon:
        closed = np.vstack([ring, ring[:1]])
        if a * e - b * d < 0:  # rows run down and y up
            closed = closed[::-1]
        if georeference is PIXELS:
            rings.append(closed.tolist())
        else:
            x, y = closed.T.astype(float)
            rings.append(np.stack([a * x + b * y + c, d * x + e * y + f], 1).tolist())
    return rings
