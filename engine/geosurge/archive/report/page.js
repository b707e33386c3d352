"use strict";
// Without this the map is whole and still; with it one can look closer.
const world = document.getElementById("world");
if (world) {
  const whole = world.viewBox.baseVal;
  const [width, height] = [whole.width, whole.height];
  const closest = 64;
  let zoom = 1, x = 0, y = 0;

  // Dots keep their size on the screen, however close the map, and shrink less than the page when this is narrow.
  const draw = () => {
    x = Math.min(Math.max(x, 0), width - width / zoom);
    y = Math.min(Math.max(y, 0), height - height / zoom);
    world.setAttribute("viewBox", [x, y, width / zoom, height / zoom].join(" "));
    world.style.setProperty("--unit", width / zoom / Math.sqrt(1160 * world.clientWidth) + "px");
    world.classList.toggle("zoomed", zoom > 1);
  };
  // Zooms by a factor about a point, given as parts of the drawing's width and height.
  const zoomBy = (factor, across = 0.5, down = 0.5) => {
    const wanted = Math.min(Math.max(zoom * factor, 1), closest);
    x += across * (width / zoom - width / wanted);
    y += down * (height / zoom - height / wanted);
    zoom = wanted;
    draw();
  };
  const move = (right, down) => {
    x += right * width / zoom;
    y += down * height / zoom;
    draw();
  };
  const place = (event) => {
    const box = world.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };

  const panel = document.querySelector(".zoom");
  panel.hidden = false;
  const actions = { in: () => zoomBy(2), out: () => zoomBy(0.5), all: () => zoomBy(0) };
  for (const button of panel.children) button.addEventListener("click", actions[button.dataset.zoom]);

  world.tabIndex = 0;
  const keys = {
    "+": actions.in, "=": actions.in, "-": actions.out, "0": actions.all,
    ArrowLeft: () => move(-0.2, 0), ArrowRight: () => move(0.2, 0), ArrowUp: () => move(0, -0.2), ArrowDown: () => move(0, 0.2),
  };
  world.addEventListener("keydown", (event) => {
    const action = keys[event.key];
    // Browsers have uses of their own for these keys with a modifier, and for arrows where the whole map is seen.
    if (!action || event.ctrlKey || event.metaKey || event.altKey || (zoom === 1 && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    action();
  });
  world.addEventListener("dblclick", (event) => zoomBy(2, ...place(event)));
  world.addEventListener("wheel", (event) => {
    // A wheel alone scrolls the page.
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoomBy(event.deltaY < 0 ? 1.25 : 0.8, ...place(event));
  }, { passive: false });

  let held = null;
  world.addEventListener("pointerdown", (event) => { if (zoom > 1) { held = place(event); world.setPointerCapture(event.pointerId); } });
  world.addEventListener("pointermove", (event) => {
    if (!held) return;
    const now = place(event);
    move(held[0] - now[0], held[1] - now[1]);
    held = now;
  });
  for (const end of ["pointerup", "pointercancel"]) world.addEventListener(end, () => { held = null; });

  new ResizeObserver(draw).observe(world);
}
