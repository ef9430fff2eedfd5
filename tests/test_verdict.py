"""What the figures of a flow on images mean."""

import pytest

from latent_aug.diagnostics.verdict import Finding, choose_grade, interpret_figures

AT_EPS = {"eps": 0.25, "fallbacks": 0.0, "saturated": 0.01, "smoothness": 0.5}
FIGURES = {
    "images": 100,
    "bits_per_dim": 4.0,
    "uint8_identical": 100,
    "latent_std": [0.9, 1.1],
    "round_trip_max_error": 1e-6,
}


@pytest.mark.parametrize(
    ("changes", "grade", "said"),
    [
        ({}, "suits", None),
        ({"uint8_identical": 98}, "usable", "2 of 100 images do not come back"),
        ({"uint8_identical": 90}, "not usable", "10 of 100 images do not come back"),
        ({"latent_std": [0.9, 2.0]}, "usable", "the images lie off"),
        ({"latent_std": [3.2, 1.7]}, "usable", "the images lie off"),
        ({"latent_std": [0.9, 4.6]}, "not usable", "the images lie off"),
        ({"latent_std": [0.6, 1.0]}, "usable", "trained too briefly"),
        ({"latent_std": [0.1, 1.0]}, "not usable", "trained too briefly"),
        ({"latent_std": [None, 1.0]}, "not usable", "not finite"),
        ({"round_trip_max_error": None}, "not usable", "not finite"),
        ({"bits_per_dim": None}, "suits", None),
        ({"bits_per_dim": 7.9}, "suits", None),
        ({"bits_per_dim": 9.76}, "not usable", "needs 9.8 bits/dim, the uncompressed images 8"),
        ({"fallbacks": 0.001}, "suits", None),
        ({"fallbacks": 0.01}, "usable", "1.0% of the images cannot"),
        ({"fallbacks": 0.1}, "not usable", "10.0% of the images cannot"),
        ({"saturated": 0.2}, "suits", "20.0% of all pixel values"),
        ({"smoothness": 0.2}, "usable", "the changes of neighbours correlate by 0.20"),
        ({"smoothness": 0.1}, "not usable", "the changes of neighbours correlate by 0.10"),
    ],
)
def test_what_counts_as_a_finding(changes, grade, said):
    figures = FIGURES | {k: v for k, v in changes.items() if k in FIGURES}
    at_eps = AT_EPS | {k: v for k, v in changes.items() if k in AT_EPS}
    findings = list(interpret_figures(figures, at_eps))
    assert len(findings) == (said is not None)
    assert all(said in finding.text for finding in findings)
    assert choose_grade(findings) == grade


def test_the_worst_finding_decides():
    grades = ("usable", "not usable", "suits")
    assert choose_grade(Finding("", grade) for grade in grades) == "not usable"
    assert choose_grade(Finding("", grade) for grade in ("suits", "usable")) == "usable"
    assert choose_grade([]) == "suits"
