/* A stand-in for NVIDIA's libnvidia-ml.so.1, for tests on machines without a GPU.
 *
 * State lives in the memory-mapped file named by FAKE_NVML_STATE (made by biscale_env.hardware.clocks.fake_gpus.create_state), so a locked clock
 * outlives the process that locked it, as on a real GPU. The layout repeats HEADER_DTYPE and GPU_DTYPE of biscale_env/hardware/clocks/fake_gpus.py.
 * Environment: FAKE_NVML_PRIV=0 makes this process unprivileged whatever the file says.
 */
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };

typedef struct {
    uint64_t magic;
    int64_t n_gpus, privileged, set_latency_us;
    double delay_s, spare[3];
} Header;

typedef struct {
    char uuid[96], name[96];
    double freq_mhz, inflight_mhz, apply_at_s, wanted_mhz, previous_mhz, landed_at_s, default_mhz, min_mhz, max_mhz, step_mhz,
        memory_mhz, temperature_c;
    int64_t reasons, locked, n_sets, n_resets, lost, external;
    double effective_mhz, energy_j, power_w, power_at_s, toy_idle_w, toy_slope_w, limit_w, limit_inflight_w, limit_at_s, limit_wanted_w, limit_low_w,
        limit_high_w, limit_default_w;
    int64_t n_caps, n_uncaps;
} Gpu;

typedef struct {
    uint32_t field_id, scope_id;
    int64_t timestamp, latency_us;
    uint32_t value_type, status;
    union { double d; uint32_t ui; uint64_t ull; } value;
} FieldValue;

static Header *header;
static Gpu *gpus;
static int fd = -1;
static int persistence;

int64_t fake_header_bytes(void) { return sizeof(Header); }
int64_t fake_gpu_bytes(void) { return sizeof(Gpu); }

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double toy_mhz(Gpu *g) {
    if (g->limit_w <= 0) return g->freq_mhz;
    double room = fmax(g->limit_w - g->toy_idle_w, 0.0);
    return fmin(g->freq_mhz, 1e3 * cbrt(room / g->toy_slope_w));
}

static void integrate(Gpu *g, double now) {
    if (g->external) return;
    double ghz = toy_mhz(g) * 1e-3, power = g->toy_idle_w + g->toy_slope_w * ghz * ghz * ghz;
    if (now > g->power_at_s) g->energy_j += power * (now - g->power_at_s);
    g->power_w = power;
    g->power_at_s = now;
}

static void land_limit(Gpu *g, double landed) {
    integrate(g, landed);
    g->limit_w = g->limit_inflight_w;
    g->limit_inflight_w = g->limit_wanted_w;
    g->limit_at_s = g->limit_wanted_w == g->limit_w ? INFINITY : landed + header->delay_s;
}

static void land_clock(Gpu *g, double landed) {
    integrate(g, landed);
    g->previous_mhz = g->freq_mhz;
    g->freq_mhz = g->inflight_mhz;
    g->landed_at_s = landed;
    if (g->wanted_mhz == g->freq_mhz) {
        g->apply_at_s = INFINITY;
    } else {
        g->inflight_mhz = g->wanted_mhz;
        g->apply_at_s = landed + header->delay_s;
    }
}

static void settle(Gpu *g, double now) {
    double due;
    while ((due = fmin(g->limit_at_s, g->apply_at_s)) <= now) { /* in the order of time */
        if (g->limit_at_s == due) land_limit(g, due);
        else land_clock(g, due);
    }
    integrate(g, now);
}

static void want(Gpu *g, double freq, double now) {
    if (freq == g->wanted_mhz) return;
    g->wanted_mhz = freq;
    if (isinf(g->apply_at_s)) {
        g->inflight_mhz = freq;
        g->apply_at_s = now + header->delay_s;
        settle(g, now);
    }
}

static int begin(Gpu *g) {
    if (!header) return UNINITIALIZED;
    if (g->lost) return GPU_IS_LOST;
    flock(fd, LOCK_EX);
    settle(g, now_s());
    return OK;
}

static int end(void) {
    flock(fd, LOCK_UN);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (header) return OK;
    const char *path = getenv("FAKE_NVML_STATE");
    if (!path || (fd = open(path, O_RDWR | O_CLOEXEC)) < 0) return DRIVER_NOT_LOADED;
    struct stat info;
    fstat(fd, &info);
    void *map = mmap(NULL, info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) return DRIVER_NOT_LOADED;
    header = map;
    gpus = (Gpu *)(header + 1);
    return OK;
}

int nvmlShutdown(void) { return header ? OK : UNINITIALIZED; }
const char *nvmlErrorString(int code) { return code == NO_PERMISSION ? "Insufficient Permissions" : "fake NVML error"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    strncpy(text, "fake-1.0", size);
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!header) return UNINITIALIZED;
    *count = (unsigned)header->n_gpus;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **handle) {
    if (!header) return UNINITIALIZED;
    if ((int64_t)index >= header->n_gpus) return INVALID_ARGUMENT;
    *handle = gpus + index;
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **handle) {
    for (int64_t k = 0; header && k < header->n_gpus; k++)
        if (!strcmp(gpus[k].uuid, uuid)) {
            *handle = gpus + k;
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Gpu *g, char *text, unsigned size) {
    strncpy(text, g->uuid, size);
    return OK;
}

int nvmlDeviceGetName(Gpu *g, char *text, unsigned size) {
    strncpy(text, g->name, size);
    return OK;
}

static int allowed(void) {
    const char *here = getenv("FAKE_NVML_PRIV");
    return header->privileged && !(here && here[0] == '0');
}

int nvmlDeviceSetGpuLockedClocks(Gpu *g, unsigned low, unsigned high) {
    if (!header) return UNINITIALIZED;
    if (!allowed()) return NO_PERMISSION;
    if (low == 0 || low > high || high < g->min_mhz || high > g->max_mhz) return INVALID_ARGUMENT;
    usleep((useconds_t)header->set_latency_us);
    int code = begin(g);
    if (code) return code;
    g->locked = 1;
    g->n_sets++;
    want(g, g->max_mhz - g->step_mhz * round((g->max_mhz - high) / g->step_mhz), now_s());
    return end();
}

int nvmlDeviceResetGpuLockedClocks(Gpu *g) {
    if (!header) return UNINITIALIZED;
    if (!allowed()) return NO_PERMISSION;
    usleep((useconds_t)header->set_latency_us);
    int code = begin(g);
    if (code) return code;
    g->locked = 0;
    g->n_resets++;
    want(g, g->default_mhz, now_s());
    return end();
}

int nvmlDeviceGetPowerManagementLimitConstraints(Gpu *g, unsigned *low, unsigned *high) {
    if (g->lost) return GPU_IS_LOST;
    *low = (unsigned)(g->limit_low_w * 1e3);
    *high = (unsigned)(g->limit_high_w * 1e3);
    return OK;
}

int nvmlDeviceGetPowerManagementDefaultLimit(Gpu *g, unsigned *milliwatts) {
    if (g->lost) return GPU_IS_LOST;
    *milliwatts = (unsigned)(g->limit_default_w * 1e3);
    return OK;
}

int nvmlDeviceGetPowerManagementLimit(Gpu *g, unsigned *milliwatts) {
    if (g->lost) return GPU_IS_LOST;
    *milliwatts = (unsigned)(g->limit_wanted_w * 1e3);
    return OK;
}

int nvmlDeviceSetPowerManagementLimit(Gpu *g, unsigned milliwatts) {
    if (!header) return UNINITIALIZED;
    if (!allowed()) return NO_PERMISSION;
    double limit = milliwatts * 1e-3;
    if (limit < g->limit_low_w || limit > g->limit_high_w) return INVALID_ARGUMENT;
    usleep((useconds_t)header->set_latency_us);
    int code = begin(g);
    if (code) return code;
    if (limit == g->limit_default_w) g->n_uncaps++;
    else g->n_caps++;
    if (limit != g->limit_wanted_w) {
        g->limit_wanted_w = limit;
        if (isinf(g->limit_at_s)) {
            g->limit_inflight_w = limit;
            g->limit_at_s = now_s() + header->delay_s;
            settle(g, now_s());
        }
    }
    return end();
}

int nvmlDeviceGetClockInfo(Gpu *g, unsigned kind, unsigned *mhz) {
    int code = begin(g);
    if (code) return code;
    double core = g->external ? g->freq_mhz : toy_mhz(g);
    if (g->effective_mhz > 0 && g->effective_mhz < core) core = g->effective_mhz;
    *mhz = (unsigned)(kind == 2 ? g->memory_mhz : core);
    return end();
}

int nvmlDeviceGetCurrentClocksEventReasons(Gpu *g, unsigned long long *bits) {
    if (g->lost) return GPU_IS_LOST;
    *bits = (unsigned long long)g->reasons;
    return OK;
}

int nvmlDeviceGetTemperature(Gpu *g, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    if (g->lost) return GPU_IS_LOST;
    *celsius = (unsigned)g->temperature_c;
    return OK;
}

int nvmlDeviceGetPowerUsage(Gpu *g, unsigned *milliwatts) {
    int code = begin(g);
    if (code) return code;
    *milliwatts = (unsigned)(g->power_w * 1e3);
    return end();
}

int nvmlDeviceGetFieldValues(Gpu *g, int count, FieldValue *values) {
    int code = begin(g);
    if (code) return code;
    for (int k = 0; k < count; k++) {
        values[k].status = values[k].field_id == 186 ? OK : NOT_SUPPORTED;
        values[k].value_type = 1;
        values[k].value.ui = (uint32_t)(g->power_w * 1e3);
    }
    return end();
}

int nvmlDeviceGetTotalEnergyConsumption(Gpu *g, unsigned long long *millijoules) {
    int code = begin(g);
    if (code) return code;
    double extra = g->power_w * (now_s() - g->power_at_s);
    *millijoules = (unsigned long long)((g->energy_j + (extra > 0 ? extra : 0)) * 1e3);
    return end();
}

int nvmlDeviceGetSupportedMemoryClocks(Gpu *g, unsigned *count, unsigned *mhz) {
    unsigned room = *count;
    *count = 1;
    if (room < 1 || !mhz) return INSUFFICIENT_SIZE;
    mhz[0] = (unsigned)g->memory_mhz;
    return OK;
}

int nvmlDeviceGetSupportedGraphicsClocks(Gpu *g, unsigned memory, unsigned *count, unsigned *mhz) {
    if (memory != (unsigned)g->memory_mhz) return INVALID_ARGUMENT;
    unsigned room = *count, needed = (unsigned)((g->max_mhz - g->min_mhz) / g->step_mhz + 1e-9) + 1;
    *count = needed;
    if (room < needed || !mhz) return INSUFFICIENT_SIZE;
    for (unsigned k = 0; k < needed; k++) mhz[k] = (unsigned)(g->max_mhz - k * g->step_mhz);
    return OK;
}

int nvmlDeviceGetPersistenceMode(Gpu *g, unsigned *mode) {
    (void)g;
    *mode = (unsigned)persistence;
    return OK;
}

int nvmlDeviceSetPersistenceMode(Gpu *g, unsigned mode) {
    (void)g;
    if (!allowed()) return NO_PERMISSION;
    persistence = (int)mode;
    return OK;
}
