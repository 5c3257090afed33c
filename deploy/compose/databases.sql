-- PostgreSQL makes the database of POSTGRES_DB (optuna) by itself; MLflow needs one of its own,
-- because both keep their schema's version in a table of the same name.
CREATE DATABASE mlflow;
