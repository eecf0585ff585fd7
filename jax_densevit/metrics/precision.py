"""Average precision of instance masks, as COCO and as Cityscapes count it.

Both rank predictions by score and average over ten IoU thresholds, 0.50 to 0.95; otherwise they differ:

| | COCO (pycocotools) | Cityscapes (cityscapesScripts) |
|---|---|---|
| a match needs | IoU >= threshold | IoU > threshold |
| who matches | by score, each takes the best free object | each object, its best-scored prediction; the others err |
| crowd, group | absorbs any number, by intersection / prediction | excuses a prediction by its share of pixels |
| not scored | objects outside the area range | objects below `min_area`; void pixels excuse |
| curve | precision made monotone, read at 101 recalls | central differences between scores |

Matching goes by score and is greedy; the best assignment would be another number. Overlaps are counted on the device,
the rest is done on the host in float64. A state keeps a few numbers per prediction, so merging is exact; among equal
scores the order of merging decides, as in the originals.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_densevit.metrics.metric import State
from jax_densevit.metrics.overlaps import mask_overlaps

THRESHOLDS = np.arange(10, 20) / 20  # of IoU
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # pixels, inclusive
RECALLS = np.linspace(0, 1, 101)
DETECTIONS = (1, 10, 100)  # per image and class


class _Precision:
    """What both share: measuring."""

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)

    def measure(
        self,
        predicted: jax.Array,
        predicted_class: jax.Array,
        score: jax.Array,
        truth: jax.Array,
        truth_class: jax.Array,
        truth_crowd: jax.Array,
        void: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> State:
        """Overlaps of one batch; runs inside `jit`.

        Args:
          predicted: bool `[B, N, H, W]`, masks at the size of the truth; an empty mask is no prediction.
          predicted_class: int `[B, N]`, 0..K-1; another number makes a slot empty.
          score: float `[B, N]`.
          truth: bool `[B, T, H, W]`.
          truth_class: int `[B, T]`, 0..K-1; another number makes a slot empty, and so does an empty mask.
          truth_crowd: bool `[B, T]`: a group of objects nobody told apart.
          void: bool `[B, H, W]`: pixels whose truth is unknown; Cityscapes' rules know them, COCO's do not.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
        """
        overlaps = mask_overlaps(predicted, truth, void, mask)
        return {
            **overlaps,
            "predicted_class": predicted_class,
            "score": score,
            "truth_class": truth_class,
            "truth_crowd": truth_crowd,
        }

    def merge(self, a: State, b: State) -> State:
        """The predictions of both in this order, and the sums of the rest; takes what `measure` returned, too."""
        a, b = self._counted(a), self._counted(b)
        rows = {name: np.concatenate([a[name], b[name]]) for name in a if name not in self._sums}
        return rows | {name: a[name] + b[name] for name in self._sums}

    def _counted(self, state: State) -> State:
        if "both" not in state:
            return state
        rows, sums = [], {name: np.zeros_like(value) for name, value in self.empty().items() if name in self._sums}
        arrays = {name: np.asarray(value) for name, value in state.items()}
        for image in range(len(arrays["both"])):
            mine = {name: value[image] for name, value in arrays.items()}
            seen = np.union1d(mine["predicted_class"], mine["truth_class"])
            for label in seen[(seen >= 0) & (seen < len(self.classes))]:
                p = np.flatnonzero((mine["predicted_class"] == label) & (mine["predicted_area"] > 0))
                t = np.flatnonzero((mine["truth_class"] == label) & (mine["truth_area"] > 0))
                if len(p) or len(t):
                    chosen = {
                        "both": mine["both"][np.ix_(p, t)].astype(np.float64),
                        **{n: mine[n][p].astype(np.float64) for n in ("predicted_area", "void_area", "score")},
                        "truth_area": mine["truth_area"][t].astype(np.float64),
                        "truth_crowd": mine["truth_crowd"][t].astype(bool),
                    }
                    rows.append(self._image(label, chosen, sums))
        empty = self.empty()
        names = [name for name in empty if name not in self._sums]
        return {name: np.concatenate([empty[name], *(row[name] for row in rows)]) for name in names} | sums


class CocoPrecision(_Precision):
    """AP and AR of masks by COCO's rules, with bins of area.

    Args:
      classes: the class names.
    """

    _sums = ("objects",)

    def empty(self) -> State:
        """Per prediction `label`, `rank` (within its image and class) int64, `score` float64, `hit` and `excused` bool
        [areas, thresholds]; `objects` int64 [K, areas]."""
        flags = np.zeros((0, len(AREAS), len(THRESHOLDS)), bool)
        return {
            "label": np.zeros(0, np.int64),
            "rank": np.zeros(0, np.int64),
            "score": np.zeros(0),
            "hit": flags,
            "excused": flags,
            "objects": np.zeros((len(self.classes), len(AREAS)), np.int64),
        }

    def _image(self, label: int, a: State, sums: State) -> State:
        order = np.argsort(-a["score"], kind="stable")[: DETECTIONS[-1]]
        both, area = a["both"][order], a["predicted_area"][order]
        crowd, truth_area = a["truth_crowd"], a["truth_area"]
        iou = both / np.where(crowd, area[:, None], area[:, None] + truth_area - both)
        limits = np.linspace(0.5, 0.95, 10)[:, None]  # as pycocotools makes them: 0.9 is one bit lower
        low, high = np.array(list(AREAS.values())).T[..., None]
        ignored = crowd | (truth_area < low) | (truth_area > high)  # [areas, T]
        sums["objects"][label] += (~ignored).sum(1)
        hit = np.zeros((len(order), len(AREAS), len(THRESHOLDS)), bool)
        excused = np.zeros_like(hit)
        free = np.ones((len(AREAS), len(THRESHOLDS), len(crowd)), bool)
        for i in range(len(order)):
            fits = (iou[i] >= limits) & (free | crowd)
            scored = fits & ~ignored[:, None]
            some = scored.any(-1)
            candidates = np.where(some[..., None], scored, fits)  # an ignored object only where no scored one fits
            found = candidates.any(-1)
            if found.any():
                # The best; among equals the last, as pycocotools walks.
                at = len(crowd) - 1 - np.where(candidates, iou[i], -1)[..., ::-1].argmax(-1)
                areas, thresholds = np.nonzero(found)
                free[areas, thresholds, at[found]] = False
            hit[i] = some
            outside = ((area[i] < low) | (area[i] > high)) & ~found
            excused[i] = (found & ~some) | outside
        return {
            "label": np.full(len(order), label),
            "rank": np.arange(len(order)),
            "score": a["score"][order],
            "hit": hit,
            "excused": excused,
        }

    def compute(self, state: State) -> dict[str, Any]:
        """COCO's twelve numbers in [0, 1] (None where nothing was there to be found) and `per_class` AP and AP50."""
        state, k = self._counted(state), len(self.classes)
        shape = (k, len(AREAS), len(THRESHOLDS))
        precision, recall = np.full(shape, np.nan), {most: np.full(shape, np.nan) for most in DETECTIONS}
        for label in range(k):
            mine = np.flatnonzero(state["label"] == label)
            mine = mine[np.argsort(-state["score"][mine], kind="stable")]
            hit = state["hit"][mine]
            miss = ~hit & ~state["excused"][mine]
            objects = state["objects"][label]
            for most in DETECTIONS:
                taken = state["rank"][mine] < most
                found = hit[taken].sum(0)
                recall[most][label] = found / np.where(objects > 0, objects, np.nan)[:, None]
            for area in np.flatnonzero(objects):
                for t in range(len(THRESHOLDS)):
                    precision[label, area, t] = _at_recalls(hit[:, area, t], miss[:, area, t], objects[area])
        places = list(AREAS)
        values = {"AP": precision[:, 0], "AP50": precision[:, 0, 0], "AP75": precision[:, 0, 5]}
        values |= {f"AP_{place}": precision[:, places.index(place)] for place in places[1:]}
        values |= {f"AR_{most}": recall[most][:, 0] for most in DETECTIONS}
        values |= {f"AR_{place}": recall[DETECTIONS[-1]][:, places.index(place)] for place in places[1:]}
        return {name: _mean(value) for name, value in values.items()} | {
            "objects": int(state["objects"][:, 0].sum()),
            "predictions": len(state["label"]),
            **_by_threshold(precision[:, 0]),
            "per_class": [
                {"class": name, "AP": _mean(precision[i, 0]), "AP50": _mean(precision[i, 0, 0])}
                for i, name in enumerate(self.classes)
            ],
        }


def _at_recalls(hit: np.ndarray, miss: np.ndarray, objects: int) -> float:
    """The mean of the monotone precision at 101 recalls, 0 beyond the last reached; predictions by falling score."""
    tp, fp = np.cumsum(hit).astype(np.float64), np.cumsum(miss).astype(np.float64)
    precision = tp / (fp + tp + np.spacing(1))
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(tp / objects, RECALLS, side="left")
    return float(np.append(monotone, 0)[at].mean())


class CityscapesPrecision(_Precision):
    """AP and AP50 of masks by Cityscapes' rules.

    Args:
      classes: the class names.
      min_area: pixels; smaller objects are neither wanted nor wrong. 100 at 1024 x 2048, in proportion elsewhere.
    """

    _sums = ("missed", "objects", "predictions")

    def __init__(self, classes: Sequence[str], min_area: float = 100):
        super().__init__(classes)
        self.min_area = min_area

    def empty(self) -> State:
        """Per counted prediction `label` int64, `score` float64, `right` and `wrong` bool [thresholds]; per class
        `missed` int64 [K, thresholds], `objects` and `predictions` int64 [K]."""
        k, flags = len(self.classes), np.zeros((0, len(THRESHOLDS)), bool)
        return {
            "label": np.zeros(0, np.int64),
            "score": np.zeros(0),
            "right": flags,
            "wrong": flags,
            "missed": np.zeros((k, len(THRESHOLDS)), np.int64),
            "objects": np.zeros(k, np.int64),
            "predictions": np.zeros(k, np.int64),
        }

    def _image(self, label: int, a: State, sums: State) -> State:
        both, area, score = a["both"], a["predicted_area"], a["score"]
        small = a["truth_area"] < self.min_area
        wanted = ~small & ~a["truth_crowd"]
        iou = both / (area[:, None] + a["truth_area"] - both)
        over = iou[..., None] > THRESHOLDS  # [N, T, thresholds]
        excused = (a["void_area"] + both @ (a["truth_crowd"].astype(np.float64) + small)) / area
        # A pixel counts as excused twice where a group is also too small, as in the original.
        wrong = ~over.any(1) & (excused[:, None] <= THRESHOLDS)
        sums["objects"][label] += wanted.sum()
        sums["predictions"][label] += len(score)
        sums["missed"][label] += (~over[:, wanted].any(0)).sum(0)
        right = np.zeros_like(wrong)
        rows = [(score, right, wrong)]
        order = np.argsort(-score, kind="stable")
        for t in np.flatnonzero(wanted):
            claims = over[order, t]
            first = claims & (np.cumsum(claims, 0) == 1)
            rows.append((score[order], first, claims & ~first))
        scores, right, wrong = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        kept = (right | wrong).any(1)
        return {
            "label": np.full(kept.sum(), label),
            "score": scores[kept],
            "right": right[kept],
            "wrong": wrong[kept],
        }

    def compute(self, state: State) -> dict[str, Any]:
        """`AP`, `AP50` in [0, 1] (None where no class has an object) and `per_class`, None where it has none."""
        state = self._counted(state)
        ap = np.full((len(self.classes), len(THRESHOLDS)), np.nan)
        for label in np.flatnonzero(state["objects"]):
            mine = state["label"] == label
            for t in range(len(THRESHOLDS)):
                right, wrong = state["right"][mine, t], state["wrong"][mine, t]
                counted = right | wrong
                ap[label, t] = _between_scores(
                    state["score"][mine][counted], right[counted], int(state["missed"][label, t])
                )
        return {
            "AP": _mean(ap),
            "AP50": _mean(ap[:, 0]),
            "objects": int(state["objects"].sum()),
            "predictions": int(state["predictions"].sum()),
            **_by_threshold(ap),
            "per_class": [
                {
                    "class": name,
                    "AP": _mean(ap[i]),
                    "AP50": _mean(ap[i, 0]),
                    "objects": int(state["objects"][i]),
                    "predictions": int(state["predictions"][i]),
                }
                for i, name in enumerate(self.classes)
            ],
        }


def _between_scores(score: np.ndarray, right: np.ndarray, missed: int) -> float:
    """The area under precision over recall at each distinct score, by central differences; 0 without predictions."""
    if not len(score):
        return 0.0
    order = np.argsort(score, kind="stable")
    _, first = np.unique(score[order], return_index=True)
    below = np.concatenate([[0], np.cumsum(right[order])])[first]  # right ones with a lower score
    tp, taken = right.sum() - below, len(score) - first
    found = right.sum() + missed
    precision = np.append(tp / taken, 1.0)
    recall = np.append(tp / found if found else np.zeros(len(tp)), 0.0)
    steps = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ ((steps[:-2] - steps[2:]) / 2))


def _by_threshold(ap: np.ndarray) -> dict[str, Any]:
    """`thresholds` of IoU and `AP_at`, the mean over classes at each; of `[K, thresholds]`."""
    return {"thresholds": THRESHOLDS.tolist(), "AP_at": [_mean(column) for column in ap.T]}


def _mean(values: np.ndarray) -> float | None:
    """Mean over the defined values; None when there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None
