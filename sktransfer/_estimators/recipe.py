"""The recommended pipeline: features of all layers, and a classifier."""

from __future__ import annotations

from typing import Any

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer._estimators.pretrained import GOOD_FEATURES, PretrainedFeatureExtractor

__all__ = ["make_classifier"]


def make_classifier(
    backbone: Any = "efficientnet_lite0", *, classifier: Any = None, **parameters: Any
) -> Pipeline:
    """Make a pipeline of the features of all layers of a network, and a classifier.

    Of what was compared, it alone is among the best on every task, with few images and with
    hundreds: see "The recipe" in docs/results/features.md.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        See :class:`PretrainedFeatureExtractor`.
    classifier : estimator, default=None
        What learns from the features. None for a logistic regression on standardised features,
        which has probabilities. With a thousand images and more, ``SVC(C=10)`` may be better, but
        takes longer.
    **parameters
        Further parameters of :class:`PretrainedFeatureExtractor`, such as `memory`. They replace
        those of the recipe, ``layer="all", pooling=("avg", "max"), normalize=True``: a network
        without blocks needs ``layer="output"``.

    Returns
    -------
    sklearn.pipeline.Pipeline
        It takes images and labels of any type. Its steps are called `pretrainedfeatureextractor`
        and, without a classifier of your own, `standardscaler` and `logisticregression`. With a
        `memory`, a search over `logisticregression__C` runs the network once for each image.

    See Also
    --------
    sktransfer.FineTunedClassifier : Trains blocks of the network as well.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import make_classifier
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [photo[:, left : left + 80] for photo in (china, flower) for left in range(0, 640, 80)]
    >>> model = make_classifier(image_size=64).fit(X, ["china"] * 8 + ["flower"] * 8)
    >>> model.predict([china, flower]).tolist()
    ['china', 'flower']
    """
    extractor = PretrainedFeatureExtractor(backbone, **(GOOD_FEATURES | parameters))
    if classifier is not None:
        return make_pipeline(extractor, classifier)
    return make_pipeline(extractor, StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
