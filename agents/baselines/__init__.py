"""Other ways of setting controls, compared with the policy."""
