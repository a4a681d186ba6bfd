"""Learners: how a training stage learns from its samples."""

from diffa.trainers.learners.answers import AnswerLearner
from diffa.trainers.learners.base import BatchLoss, Learner, StageCost
from diffa.trainers.learners.preferences import PreferenceLearner

__all__ = ["AnswerLearner", "BatchLoss", "Learner", "PreferenceLearner", "StageCost"]
