//! End-to-end tests of the documented behavior: a real adsidecar on real sockets in front of the sandbox's Amazon.

#![allow(unreachable_pub, dead_code, reason = "no single file uses all helpers of the harness")]

mod postgres_server;
mod harness;
mod raw_http;

mod admin;
mod backup;
mod tls;
mod clocks;
mod commands;
mod doctor;
mod explain;
mod found_accounts;
mod connections;
mod refresh_tasks;
mod diagnosis;
mod first_words;
mod floors;
mod request_target;
mod framing;
mod guard;
mod headers;
mod http2;
mod keys;
mod limits;
mod login;
mod login_command;
mod login_attacks;
mod manuals;
mod mcp;
mod nginx;
mod observability;
mod policy;
mod process;
mod proxying;
mod reload;
mod secrets;
mod review;
mod catalogue;
mod selection;
mod postgres;
mod fleet;
mod siblings;
mod stores;
mod threats;
mod throttle;
mod token_endpoint;
mod tokens;
mod tunnels;
mod upstream_faults;
mod unauthorized;
mod login_recovery;
mod users;
mod whom;
mod whom_properties;
