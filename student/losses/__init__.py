"""Loss terms: functions of the student's reduced logits (`sparse`), of hidden states (`hidden`), and the
fused head.
"""
