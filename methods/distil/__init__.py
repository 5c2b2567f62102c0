"""Criteria: how a student learns from a teacher's signal, wherever that signal comes from.

A criterion never asks who teaches. It gets a ``Teaching`` for the batch, which is the same object for a plain
teacher, a teacher with angular views, noisy copies (``tekap``) or several teachers, and which

- gives a probability target at any temperature: ``teaching.target(T)``, softened member by member, then averaged;
- gives pooled features: ``teaching.pooled``, or ``teaching.pooled_terms`` for a criterion that is a sum over members;
- gives the feature maps of the network itself: ``teaching.maps``;
- tells how much stronger than a distribution the target is: ``teaching.mass`` (1, but for TeKAP and the release).

To add a criterion, write one file of three parts and add one line to the table in ``methods/__init__.py``:

1. the loss, a pure function of tensors: ``my_loss(student_logits_BC, target_BC, temperature) -> scalar``;
2. the settings, a frozen keyword-only dataclass over ``DistilledSettings`` (or ``TemperedSettings``): its defaults are
   those of the paper; ``kd_weight`` is always the weight of what compares probabilities;
3. the class. What compares logits extends ``DistilledStudent`` and says what its losses are::

       class MyDistillation(DistilledStudent):
           '''One line that a stranger understands. Losses ``ce`` and ``mine``.'''

           Settings = MySettings

           def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
               target_BC = teaching.target(self.settings.temperature)
               loss = my_loss(student.logits, target_BC, self.settings.temperature)
               return {"mine": Loss(loss, self.kd_weight(batch) * teaching.mass)}

   What compares features extends ``FeatureStudent`` instead and implements ``feature_losses`` with the same
   arguments; the label loss and plain distillation (``kd_weight``, 0 by default) are added by the base, so that a
   combined form is configuration. ``inputs`` says what is needed: ``{"teacher": {"logits", "pooled"}}`` or with
   ``"maps"``; impossible sources are refused from that when the experiment is planned (``refusals``).

Label loss, own losses of branches, target weights, the metric ``effective_kd_weight`` and evaluation come from the base.
Modules that train beside the student (adapters) are plain attributes set after ``super().__init__``; what is remembered
per sample (predictions, memory banks) is a ``SampleMemory``, sized in ``prepare``. A criterion that joins the table
joins the contract tests (``tests/methods``) and the matrix test of every criterion with every source.
"""
